"""checks.py: what is accepted as it is, and the sentence for what isn't."""

import math

import numpy as np
import pytest

from tinycifar.checks import check_choice, check_flag, check_number, check_whole, explained


@pytest.mark.parametrize("value", [0, 1, 0.5, 1.0])
def test_a_number_in_range_is_returned_as_it_is(value):
    assert check_number("lr", value, 0, 1) is value


@pytest.mark.parametrize(
    ("check", "value", "plain"),
    [
        (check_number, np.float32(0.5), 0.5),
        (check_number, np.float64(0.5), 0.5),  # which is a float as well
        (check_number, np.int64(1), 1.0),
        (check_whole, np.int64(7), 7),
        (check_whole, np.uint8(7), 7),
    ],
)
def test_numpys_numbers_come_back_as_plain_ones(check, value, plain):
    checked = check("n", value, 0, 10)
    assert checked == plain and type(checked) in (int, float)


@pytest.mark.parametrize(
    "value", [-0.1, 1.1, math.nan, math.inf, True, "0.5", None, [0.5], 1j, np.array([0.5])]
)
def test_what_is_no_number_in_range_is_refused(value):
    with pytest.raises(ValueError) as error:
        check_number("lr", value, 0, 1)
    assert str(error.value) == f"lr must be a number from 0 to 1; got {value!r}"


@pytest.mark.parametrize("value", [0, 2.0, np.float64(2), "2", False, None, math.nan])
def test_what_is_no_whole_number_in_range_is_refused(value):
    with pytest.raises(ValueError) as error:
        check_whole("jobs", value, 1, 1024)
    assert str(error.value) == f"jobs must be a whole number from 1 to 1,024; got {value!r}"


def test_a_message_names_an_open_range_and_what_else_is_accepted():
    with pytest.raises(ValueError, match=r"^top must be a whole number of 1 or more; got 0$"):
        check_whole("top", 0, 1)
    with pytest.raises(ValueError, match=r"^ema must be a number from 0 to 0\.9 or None; got 1$"):
        check_number("ema", 1, 0, 0.9, "None")
    assert check_whole("top", 10**9, 1) == 10**9


@pytest.mark.parametrize("value", ["no", 0, 1, None, np.bool_(True)])
def test_a_flag_is_true_or_false(value):
    check_flag("force", True)
    check_flag("force", False)
    with pytest.raises(ValueError) as error:
        check_flag("force", value)
    assert str(error.value) == f"force must be True or False; got {value!r}"


def test_a_choice_lists_the_valid_ones():
    check_choice("compile", "auto", (True, False, "auto"))
    check_choice("recipe", "quick", {"quick": 1, "tuned": 2})
    with pytest.raises(ValueError, match=r"^unknown compile 'yes'; valid: True, False, auto$"):
        check_choice("compile", "yes", (True, False, "auto"))
    with pytest.raises(ValueError, match=r"^unknown recipe 'quik'; valid: quick, tuned$"):
        check_choice("recipe", "quik", (name for name in ("quick", "tuned")))


@pytest.mark.parametrize(
    "message",
    [
        "MemoryError",
        "Unable to allocate 728. TiB for an array with shape (100000000000000,)",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory",
        "std::bad_alloc",
        "CUDA out of memory. Tried to allocate 20.00 MiB",
        "[Errno 12] Cannot allocate memory",
        "libtorch_cpu.so: failed to map segment from shared object",
        "DataLoader worker (pid 12) is killed by signal: Killed. ",
        "Kernel died",
        "A process in the process pool was terminated abruptly while the future was running",
    ],
)
def test_want_of_memory_is_named_by_whatever_it_shows_itself(message):
    says = explained(message)
    assert says.startswith(f"most likely memory ran out ({message})")
    assert "the same command goes on" in says


def test_other_errors_are_as_they_were():
    for message in ("lr must be a number", "No space left on device", ""):
        assert explained(message) == message
