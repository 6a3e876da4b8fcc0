"""samples_seen is the one clock: what is due follows from it, whatever a batch holds and wherever a start begins."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from seer_scale.training.clock import Clock


@given(batch=st.integers(1, 50), updates=st.integers(1, 40), every=st.integers(0, 100), first=st.integers(0, 100))
def test_each_multiple_is_passed_by_one_update_which_is_foreseen(batch, updates, every, first):
    clock = Clock(batch, first + batch * updates, first)
    passed = set()
    while not clock.at_end:
        foreseen, last, before = clock.will_pass_multiple(every), clock.is_last_update, clock.samples_seen
        clock.advance()
        assert (foreseen, last) == (clock.passed_multiple(every), clock.at_end)
        if foreseen:
            here = {n for n in range(before + 1, clock.samples_seen + 1) if n % every == 0}
            assert here and not here & passed
            passed |= here
    assert clock.step == updates
    assert passed == ({n for n in range(first + 1, clock.end + 1) if n % every == 0} if every else set())
