import gc

import pytest

from dattrain.runtime.imports import uncollected


@pytest.mark.parametrize("ours", [False, True])
def test_what_others_hold_stays_collectable_where_the_process_is_not_ours(ours):
    gc.unfreeze()
    try:
        with uncollected("a_module_that_nobody_has", ours=ours):
            assert not gc.isenabled()
        assert gc.isenabled() and (gc.get_freeze_count() > 0) == ours
    finally:
        gc.unfreeze()
