from __future__ import annotations

import pytest
from report_results import Make, make_result


@pytest.fixture
def make() -> Make:
    """Builds a result as a transfer makes it, without making one."""
    return make_result
