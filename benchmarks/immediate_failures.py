"""A pytest plugin (-p benchmarks.immediate_failures): a line for each failure, at once.

A run that is ended early has no summary, so what failed until then would be lost.
"""

import pytest


class _Teller:
    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = " ".join((crash.message if crash else str(report.longrepr)).split())
            self.terminal.ensure_newline()
            self.terminal.write_line(f"FAILED {report.nodeid} ({report.when}): {why[:400]}")
            self.terminal.flush()


@pytest.hookimpl(trylast=True)  # the terminal is there by then
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):  # which those of pytest-xdist have
        config.pluginmanager.register(_Teller(terminal))
