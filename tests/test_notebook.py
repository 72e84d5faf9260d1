"""The notebook in docs/ runs from its first cell to its last, and shows what it promises."""

import ast
import json
import sys
import types
from pathlib import Path

import pytest

NOTEBOOK = json.loads((Path(__file__).parents[1] / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(cell: str, names: dict) -> object:
  """Run a cell and return the value of its last line, which a notebook shows; None if that is no expression."""
  tree = ast.parse(cell)
  last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
  exec(compile(tree, "cell", "exec"), names)
  return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_every_cell_runs_and_shows_something(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  # IPython is not needed otherwise.
  monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(HTML=str))
  names: dict = {}
  shown = [run(cell, names) for cell in CELLS]
  assert "<svg" in names["result"]._repr_html_()
  assert str(shown[2]).count('<p class="explained"') == 2
  assert "most probable: " in str(shown[-1])
  output = capsys.readouterr().out
  assert "accuracy 0.9" in output and "report.html is" in output


def test_the_notebook_shows_what_was_computed():
  cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
  kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
  assert kinds == {"stream", "display_data", "execute_result"}, "no errors"
  assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
