# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Rules of the suite; its fixtures are in `common_fixtures.py`."""

import importlib
import os
import re

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads than cores make it 10 times slower

# of transformers' own tests, see test_transformers_common.py
MARKERS = "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test torch_compile_test generate order"


def pytest_configure(config):
    for name in MARKERS.split() + [f"is_{kind}_test" for kind in ("training", "tensor_parallel", "pipeline", "fsdp")]:
        config.addinivalue_line("markers", f"{name}: used by transformers")
    if hands_out(config):
        return
    pytest.register_assert_rewrite("tests.common_fixtures")
    config.pluginmanager.register(importlib.import_module("tests.common_fixtures"))


def hands_out(config) -> bool:
    """Whether this process runs no test, but hands them to others (pytest-xdist), which need not wait until it has
    imported torch and transformers, too."""
    return bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In a module with `SKIP_REASONS`, from patterns to reasons, a skipped test without a reason has failed."""
    report = yield
    if report.skipped and (reasons := getattr(getattr(item, "module", None), "SKIP_REASONS", None)):
        said = f"{item.nodeid.split('::', 1)[1]}: {report.longrepr[2]}"
        found = [reason for pattern, reason in reasons.items() if re.search(pattern, said)]
        report.longrepr = (*report.longrepr[:2], f"{report.longrepr[2]} ({found[0]})") if found else said
        report.outcome = "skipped" if found else "failed"
    return report
