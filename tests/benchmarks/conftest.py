"""Prints what was measured as one Markdown table, relative to the floor of the same run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it alone


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "default")  # others' warnings do not matter here


def pytest_terminal_summary(terminalreporter):
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    rows = [bench for bench in session.benchmarks if not bench.has_error]
    medians = {(bench.group, bench.extra_info.get("name")): bench.stats.median for bench in rows}
    write = terminalreporter.write_line
    write("")
    write("| group | implementation | ms | / floor | peak extra MB |")
    write("|---|---|---:|---:|---:|")
    for bench in rows:
        info, median = bench.extra_info, bench.stats.median
        floor = medians.get((bench.group, "floor"))
        ratio = f"{median / floor:.2f}" if floor else ""
        memory = f"{info['peak_mb']:.0f}" if "peak_mb" in info else ""
        write(f"| {bench.group} | {info.get('name')} | {1e3 * median:.1f} | {ratio} | {memory} |")
