"""The battery: how much of an adapter survives every kind of base upgrade, measured."""
