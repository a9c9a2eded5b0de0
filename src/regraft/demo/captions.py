"""Subjects the embedded pair knows, by their part in training, and the demo's default captions.

A caption is the emoji's name in lower case, one token per word. Both bases saw every subject of the
first two lists; the style adapters saw only :data:`STYLE_SUBJECTS` in the style, so the style on
:data:`HELD_OUT_SUBJECTS` is generalisation, not recall.
"""

from __future__ import annotations

# fmt: off
STYLE_SUBJECTS: tuple[str, ...] = (
    "banana", "watermelon", "cherries", "lemon", "peach", "tomato", "broccoli", "mushroom",
    "hamburger", "french fries", "taco", "cookie", "soft ice cream", "candy", "bread",
    "cheese wedge", "wine glass", "sushi", "cupcake", "kiwi fruit", "cat face", "rabbit face",
    "bear", "koala", "lion", "pig face", "monkey face", "owl", "honeybee", "lady beetle",
    "turtle", "octopus", "tropical fish", "spouting whale", "elephant", "hedgehog", "eagle",
    "t rex", "wolf", "baby chick", "tulip", "palm tree", "maple leaf", "sun", "cloud", "rainbow",
    "fire", "tent", "house", "airplane", "bus", "police car", "locomotive", "bicycle", "anchor",
    "trumpet", "violin", "television", "key", "bell", "pencil", "hammer", "bomb", "t shirt",
    "running shoe", "ring", "balloon", "soccer ball", "envelope", "candle", "grinning face",
    "loudly crying face", "skull", "robot", "red heart", "pear", "ear of corn", "croissant",
    "pretzel", "hot beverage", "lollipop", "mouse face", "cow face", "snake", "crab", "dolphin",
    "giraffe", "bat", "spider", "rose", "evergreen tree", "crescent moon", "helicopter",
    "tractor", "drum", "magnet", "scissors", "dress", "alarm clock",
    "smiling face with heart eyes",
)

HELD_OUT_SUBJECTS: tuple[str, ...] = (
    "red apple", "strawberry", "pineapple", "grapes", "avocado", "carrot", "eggplant", "pizza",
    "hot dog", "doughnut", "birthday cake", "beer mug", "popcorn", "pancakes", "dog face", "fox",
    "panda", "tiger face", "frog", "penguin", "unicorn", "butterfly", "snail", "fish", "shark",
    "flamingo", "sunflower", "cactus", "star", "umbrella", "snowman", "castle", "rocket",
    "automobile", "sailboat", "flying saucer", "guitar", "camera", "light bulb", "locked",
    "crown", "top hat", "gem stone", "trophy", "wrapped gift", "basketball", "teddy bear",
    "smiling face with sunglasses", "ghost", "alien",
)

EXTRA_SUBJECTS: tuple[str, ...] = (
    "coconut", "bell pepper", "potato", "waffle", "bacon", "bubble tea", "honey pot",
    "horse face", "hamster", "gorilla", "parrot", "swan", "lobster", "squid", "camel", "kangaroo",
    "cherry blossom", "four leaf clover", "deciduous tree", "snowflake", "volcano",
    "fire engine", "taxi", "motor scooter", "racing car", "ship",
    "saxophone", "microphone", "axe", "backpack", "glasses", "game die", "jack o lantern",
    "nerd face", "clown face", "sleeping face",
)

# fmt: on

#: Shown by the demo: held out in the style, and drawn recognisably by both bases.
DEFAULT_CAPTIONS: tuple[str, ...] = (
    "panda",
    "penguin",
    "dog face",
    "guitar",
    "umbrella",
    "flamingo",
    "rocket",
    "smiling face with sunglasses",
)
