"""Copy the outputs of executed notebooks into their sources, and published results into the tables of the texts.

    python tools/save_outputs.py [04_cifar10 ...]     # default: all that notebooks/executed/quick holds

Both read well then where nobody runs them. Outputs of the quick profile only. What differs from one execution to the
next (times, progress lines, execution counts' gaps, papermill's metadata) is scrubbed. The code and text of the sources
are left as they are.
"""

import re
import sys
from pathlib import Path

import nbformat

from satlib.study.results import with_tables

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
LARGEST = 1_500_000  # bytes of a source with its outputs


def scrubbed(outputs: list, cell: str) -> list:
    """The outputs without progress lines, warnings on stderr, views of widgets, and what pandas draws at random.

    cell: its id, which names its tables.
    """
    kept = []
    for output in outputs:
        if output.output_type == "stream":
            lines = output.text.splitlines(keepends=True)
            output.text = "".join(line for line in lines if not line.startswith("[run"))
            if output.name == "stderr" or not output.text:
                continue
        if "data" in output:
            output.data.pop("application/vnd.jupyter.widget-view+json", None)  # nothing is left of the widget's model
            for kind, pattern, stable in (
                ("text/html", r"\bT_[0-9a-f]{5}(?=[\"_ ])", f"T_{cell}-{len(kept)}"),
                ("text/plain", r" at 0x[0-9a-f]+>", ">"),
            ):
                if kind in output.data:
                    output.data[kind] = re.sub(pattern, stable, output.data[kind])
        kept.append(output)
    return kept


def save(stem: str) -> None:
    """Bring the outputs of one executed notebook into its source. Raises SystemExit where they do not match."""
    source = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4)
    executed = nbformat.read(NOTEBOOKS / "executed" / "quick" / f"{stem}.ipynb", as_version=4)
    by_id = {cell.id: cell for cell in executed.cells}
    count = 0
    for cell in source.cells:
        if cell.cell_type != "code":
            continue
        done = by_id.get(cell.id)
        if done is None or done.source != cell.source:
            raise SystemExit(f"{stem}: cell {cell.id} has changed since it was executed; run ./run_all.sh first")
        count += 1
        cell.execution_count = count
        cell.outputs = scrubbed(done.outputs, cell.id)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    text = nbformat.writes(source)
    if len(text) > LARGEST:
        raise SystemExit(
            f"{stem}: {len(text)} bytes with its outputs, at most {LARGEST} are wanted; use smaller figures"
        )
    (NOTEBOOKS / f"{stem}.ipynb").write_text(text + "\n", encoding="utf-8")
    print(f"{stem}: outputs saved, {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    stems = sys.argv[1:] or sorted(path.stem for path in (NOTEBOOKS / "executed" / "quick").glob("*.ipynb"))
    for stem in stems:
        save(stem)
    for text in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text.write_text(with_tables(text.read_text(encoding="utf-8")), encoding="utf-8")
