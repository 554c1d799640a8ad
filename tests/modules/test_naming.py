"""Names that users write: the one that is meant, and import paths."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offtrace.modules.naming import imported, nearest, takes

FLAGS = ["--loss.gamma", "--loss.estimator", "--optim.lr", "--optim.eps", "--env.task", "--train.name", "--preset"]


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("--loss.gama", "--loss.gamma"),
        ("--optim.gamma", "--loss.gamma"),
        ("--lr", "--optim.lr"),
        ("--optm.lr", "--optim.lr"),
        ("--optm.lrr", "--optim.lr"),
        ("--perset", "--preset"),
        ("--loss.Gamma", "--loss.gamma"),
        # one group makes no two names alike, and no other group has a name that is merely like it
        ("--loss.lamda", None),
        ("--env.game", None),
        ("--zzzzzzzz", None),
    ],
)
def test_the_nearest_flag_is_the_nearest_by_spelling(word: str, near: str | None) -> None:
    assert nearest(word, FLAGS) == (f"; did you mean {near}?" if near else "")


@pytest.mark.parametrize(
    ("word", "known", "near"),
    [
        ("lamda", ["gamma", "lmbda"], "lmbda"),
        ("Retrace", ["retrace", "q_lambda"], "retrace"),
        ("layernorm-mpl", ["mlp", "layernorm_mlp"], "layernorm_mlp"),
        ("pnog", ["pong", "ping-pong"], "pong"),
        ("x", [], None),
    ],
)
def test_the_nearest_name(word: str, known: list[str], near: str | None) -> None:
    assert nearest(word, known) == (f"; did you mean {near}?" if near else "")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(tmp_path))
    files = {
        "own_good": "class Outer:\n    class Inner:\n        pass\n\ndef make(shape, hidden): ...\nnumber = 1.0\n",
        "own_needs": "import no_such_package\n",
        "own_syntax": "def make(:\n",
        "own_name": "import os\n\nx = undefined_name\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    yield
    for name in files:
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("own")
def test_an_import_path_leads_to_a_class_or_a_function() -> None:
    assert imported("own_good:make", "network")(1, 2) is None
    assert imported("own_good:make", "network", "a", "b")(1, 2) is None
    assert imported("own_good:Outer.Inner", "estimator").__name__ == "Inner"


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("path", "words"),
    [
        (":make", "an import path is 'package.module:function', got ':make'"),
        ("own_good:", "an import path is 'package.module:function', got 'own_good:'"),
        ("own_god:make", "the network 'own_god:make' cannot be imported: there is no module 'own_god' .*on PYTHONPATH"),
        ("own_good.inside:make", "there is no module 'own_good.inside'"),
        ("own_good:mke", r"the module 'own_good' has no 'mke'; did you mean make\?$"),
        ("own_good:number", "'own_good:number' is no class and no function, but of the type float"),
        ("own_good:Outer.Iner", "has no 'Outer.Iner'"),
        ("own_needs:make", r"cannot be imported: No module named 'no_such_package' \(own_needs.py, line 1\)"),
        ("own_syntax:make", r"cannot be imported: SyntaxError: .*\(own_syntax.py, line 1\)"),
        ("own_name:make", r"cannot be imported: NameError: .*'undefined_name'.* \(own_name.py, line 3\)"),
    ],
)
def test_what_an_import_path_does_not_lead_to_is_one_sentence(path: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        imported(path, "network")
    assert "\n" not in str(raised.value)
    assert "PYTHONPATH" not in str(raised.value) or "no module" in str(raised.value)


@pytest.mark.usefixtures("own")
def test_the_current_folder_is_named_where_it_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, named in (([""], True), ([str(Path.cwd())], True), (["/elsewhere"], False)):
        monkeypatch.setattr(sys, "path", path)
        with pytest.raises(ValueError, match="there is no module 'own_god'") as raised:
            imported("own_god:make", "network")
        assert ("in the current folder or on PYTHONPATH" in str(raised.value)) == named


@pytest.mark.usefixtures("own")
def test_what_takes_other_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'own_good:make' must take \(a, b, c\), and takes \(shape, hidden\)$"):
        imported("own_good:make", "network", "a", "b", "c")
    assert takes(lambda num_envs, seed: None, num_envs=1, seed=0)
    assert not takes(lambda size: None, num_envs=1, seed=0)
