"""plot_alignment: what it draws, its fonts and its errors."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

import fusedrnn
from fusedrnn import plot

pyplot = pytest.importorskip("matplotlib.pyplot")
font_manager = pytest.importorskip("matplotlib.font_manager")
CHINESE = list("我看电影")


@pytest.fixture(autouse=True)
def no_window() -> Iterator[None]:
    with pyplot.rc_context({"backend": "agg"}):
        yield
        pyplot.close("all")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fonts but matplotlib's own, its font of placeholders among them."""
    own = [f for f in font_manager.fontManager.ttflist if f.name.startswith(("DejaVu", "Last Resort"))]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


def labels(axis) -> list[str]:
    return [text.get_text() for text in axis.get_ticklabels()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_picture_is_the_matrix(dtype: torch.dtype) -> None:
    weights = torch.rand(1, 1, 2, 3).softmax(-1).to(dtype).requires_grad_()
    ax = fusedrnn.plot_alignment(weights, ["a", "b", "c"], ["$x$", "y_"])
    drawn = torch.from_numpy(ax.images[0].get_array().data)
    torch.testing.assert_close(drawn, weights[0, 0].detach().double(), rtol=0, atol=0)
    assert labels(ax.xaxis) == ["a", "b", "c"]
    assert labels(ax.yaxis) == ["$x$", "y_"]
    assert not ax.yaxis.get_ticklabels()[0].get_parse_math()
    assert len(ax.figure.axes) == 2  # the colour bar


def test_into_axes_that_are_there() -> None:
    figure, axes = pyplot.subplots(1, 2)
    ax = fusedrnn.plot_alignment(torch.rand(40, 3), ax=axes[1])
    assert ax is axes[1]
    assert figure.axes == list(axes)
    assert all(tick == int(tick) for tick in ax.get_yticks())


def test_of_a_module() -> None:
    attention = fusedrnn.BahdanauAttention(3, 4, 5)
    _, weights = attention(torch.randn(1, 2, 3), torch.randn(1, 6, 4), need_weights=True)
    assert fusedrnn.plot_alignment(weights).images[0].get_array().shape == (2, 6)


@pytest.mark.parametrize(
    ("weights", "tokens", "error", "said"),
    [
        ([[1.0]], {}, TypeError, "weights: expected a tensor, got list"),
        (torch.ones(3), {}, ValueError, r"weights: expected shape \[Tq, Tk\].*, got \[3\]"),
        (torch.ones(2, 3, 4), {}, ValueError, r"got \[2, 3, 4\]"),
        (torch.ones(0, 4), {}, ValueError, r"got \[0, 4\]"),
        (torch.ones(3, 4), {"source": ["a"]}, ValueError, r"source: expected 4 tokens, Tk .* got 1"),
        (
            torch.ones(1, 3, 4),
            {"target": list("abcd")},
            ValueError,
            r"target: expected 3 tokens, Tq .* got 4",
        ),
    ],
)
def test_errors_name_argument_and_shape(weights, tokens, error, said) -> None:
    with pytest.raises(error, match=said):
        fusedrnn.plot_alignment(weights, **tokens)
    assert not pyplot.get_fignums()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"fusedrnn\[plot\]"):
        fusedrnn.plot_alignment(torch.ones(1, 1))


# ---- fonts -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bare")
def test_one_warning_says_which_font_to_install() -> None:
    with pytest.warns(UserWarning, match=r"no installed font has '影我电看'.*fonts-noto-cjk") as caught:
        fusedrnn.plot_alignment(torch.rand(4, 4), CHINESE, CHINESE)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.usefixtures("bare")
def test_tokens_that_the_font_has_need_no_other() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = fusedrnn.plot_alignment(torch.rand(2, 3), ["é", "Ω", "</s>\n"])
    assert ax.get_xticklabels()[0].get_fontfamily() == pyplot.rcParams["font.family"]


def test_a_font_is_found_by_its_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    fonts = [
        font_manager.FontEntry(fname=f"{n}.ttf", name=n) for n in ("Latin", "Half", "Han", "Last Resort HE")
    ]
    have = {"Half.ttf": CHINESE[:2], "Han.ttf": CHINESE, "Last Resort HE.ttf": CHINESE}
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(plot, "_characters", lambda path: frozenset(map(ord, have.get(path, "abc"))))
    default = list(pyplot.rcParams["font.family"])
    assert plot._families(["abc"]) == default
    assert plot._families(["a", *CHINESE]) == [*default, "Han"]


def test_chinese_is_drawn_where_a_font_has_it() -> None:
    fonts = [f for f in font_manager.fontManager.ttflist if not f.name.startswith("Last Resort")]
    if not any(plot._characters(f.fname) >= {*map(ord, CHINESE)} for f in fonts):
        pytest.skip("no installed font has Chinese")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of matplotlib, about a glyph that is missing
        fusedrnn.plot_alignment(torch.rand(4, 4), CHINESE, CHINESE).figure.canvas.draw()


def test_a_file_that_is_no_font_has_no_characters(tmp_path) -> None:
    path = tmp_path / "none.ttf"
    path.write_text("nothing")
    assert plot._characters(str(path)) == frozenset()
