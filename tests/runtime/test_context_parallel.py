"""One pass over two or four processes equals a pass of one process.

The processes compute both, in one gloo group.
"""

import importlib
import pkgutil

import pytest
import torch
from support.parallel_cases import Case, compare_all, compare_compiled, compare_gradients
from support.parallel_mistakes import MISTAKES
from support.processes import Processes

import flux.runtime
from flux import transformer, transformer3
from flux.runtime import context_parallel, fast

# every row: what sglang, vllm-omni or diffusers once got wrong, or could have
CASES = [
    Case("flux.1"),
    Case("flux.1", mask=True, residuals=True),
    Case("flux.1", fast=True),
    Case("flux.2"),
    Case("klein", references=((3, 4), (2, 3))),
    Case("klein", references=((3, 4), (2, 3)), cached=True),
    Case("klein", references=((3, 4),), cached=True, fast=True),
    Case("klein", mask=True, fast=True),
    Case("klein", text=3, residuals=True, fast=True),
    Case("two heads", cached=True, references=((3, 4),)),
    Case("flux.3"),
    Case("flux.3", references=((3, 4), (2, 3))),
    Case("flux.3", references=((3, 4),), fast=True),
    Case("flux.3 flow map", references=((3, 4),), per_token=True),
]
METHODS = ("allgather", "ulysses")


EVERY = [(case, method) for case in CASES for method in METHODS]
SOME = [(case, METHODS[number % 2]) for number, case in enumerate(CASES)]


def check_float64(processes: Processes, cases: list[tuple]) -> None:
    for case, outcomes in zip(cases, zip(*processes(compare_all, cases))):
        assert all(outcome.right for outcome in outcomes), (case, outcomes)


def check_bits(processes: Processes, cases: list[tuple], dtype=torch.float32) -> None:
    """Products of matrices with 16 rows more sum in the same order."""
    even = []
    for case, method in cases:
        references = ((8, 16),) if case.references else ()
        same = case._replace(text=64, grid=(8, 16), references=references, dtype=dtype)
        even.append((same, method))
    for case, outcomes in zip(even, zip(*processes(compare_all, even))):
        assert all(o.equal and o.same_everywhere for o in outcomes), (case, outcomes)


def test_all_functions_of_attention_are_replaced():
    """A module that holds one of them under its own name would attend to its own tokens alone."""
    functions = transformer.attention, transformer3.attention, fast.attend
    runtime = [module.name for module in pkgutil.iter_modules(flux.runtime.__path__)]
    modules = [importlib.import_module(f"flux.runtime.{name}") for name in runtime]
    found = {
        (module, name)
        for module in (transformer, transformer3, *modules)
        for name, value in vars(module).items()
        if module is not context_parallel and any(value is function for function in functions)
    }
    assert found == {(module, name) for module, name, _ in context_parallel.PLACES}


def test_two_processes_equal_one_in_float64(two):
    check_float64(two, SOME)


def test_two_processes_equal_one_to_the_bit_in_float32(two):
    check_bits(two, SOME[2:5])


@pytest.mark.slow
def test_two_processes_equal_one_in_all_cases(two):
    check_float64(two, EVERY)
    check_bits(two, EVERY)
    check_bits(two, SOME, torch.bfloat16)


def test_two_processes_have_the_gradients_of_one(two):
    """Of odd counts of tokens. FLUX 3 scales q and k, whose gradient is a sum, in float32."""
    references = ((3, 4), (2, 3))
    for case in (Case("flux.1"), Case("klein", references=references), CASES[11]):
        for method in METHODS:
            for of_norms, others in two(compare_gradients, case, method):
                assert others <= 1e-12, (case, method)
                assert of_norms <= (1e-6 if case.config == "flux.3" else 1e-12), (case, method)


def test_planted_mistakes_are_seen(two):
    """Each of them was shipped by somebody, or is as easily made. bfloat16 would hide most."""
    cases = [(m.case, m.method, name) for name, m in MISTAKES.items()]
    for (_, _, name), outcomes in zip(cases, zip(*two(compare_all, cases))):
        assert not all(outcome.right for outcome in outcomes), (name, outcomes)
        assert max(outcome.relative for outcome in outcomes) > 1e-3, (name, outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_blocks_exchange_in_one_graph(two, method):
    assert max(two(compare_compiled, method)) <= 2e-6  # float32, in another order


@pytest.mark.slow
def test_four_processes_equal_one_in_float64(four):
    check_float64(four, EVERY)


@pytest.mark.slow
def test_four_processes_equal_one_to_the_bit_in_float32(four):
    check_bits(four, EVERY)
