"""The diagrams and the generated parts of docs/normalisation.md against the modules and the formulas."""

import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_fixtures import randomise

from bert_ln import BertLnConfig, BertLnModel
from bert_ln.norms import NORM_CLASSES, NORMS
from bert_ln.placements import PLACEMENTS, PostNorm
from recipes import diagrams
from recipes.diagrams import (
    MARK,
    SMALL,
    arrange,
    build_encoder,
    evaluate,
    generated_parts,
    in_words,
    refresh,
    route,
    save,
    trace,
    write_all,
)
from recipes.errors import UserError

ROOT = Path(__file__).parent.parent
PAGE, FOLDER = ROOT / "docs/normalisation.md", ROOT / "docs/normalisation"
VARIANTS = [
    *((placement, {}) for placement in PLACEMENTS),
    *(("pre", {"norm_type": norm}) for norm in NORMS),
    *(("post", {"qk_norm": norm}) for norm in ("l2", "layer_norm", "rms_norm")),
    ("normformer", {"normformer_residual_scale": True}),
    ("recursive_skip", {"recursive_skip_order": 3, "recursive_skip_shared_norm": True}),
    ("hybrid_norm", {"hybrid_norm_star": True, "num_hidden_layers": 2}),
    ("residual_dual", {"num_hidden_layers": 3, "residual_dual_scale": 0.5}),
    ("b2t", {"num_hidden_layers": 2}),
]


def formula_of(graph):
    """What a graph computes, as a formula in x."""
    written = {}
    for name, node in graph.items():
        terms = [written[i] for i in node.inputs]
        match node.kind:
            case "input":
                written[name] = "x"
            case "output":
                (written[name],) = terms
            case "add":
                written[name] = plus(*terms)
            case "scale":
                written[name] = f"{node.label} {terms[0]}"
            case _:
                written[name] = f"{node.label}({', '.join(terms)})"
    return written[name]


def plus(*terms):
    return "(" + " + ".join(sorted(terms)) + ")"


def norm(x):
    return f"norm({x})"


def attention(x):
    return f"attention({x})"


def feed_forward(x):
    return f"feed-forward({x})"


def inner(x):
    """The first half of the feed-forward network."""
    return f"W₁, GELU({x})"


def post_ln(x):
    h = norm(plus(x, attention(x)))
    return norm(plus(h, feed_forward(h)))


def pre_ln(x):
    h = plus(x, attention(norm(x)))
    return plus(h, feed_forward(norm(h)))


def sandwich(x):
    h = plus(x, norm(attention(norm(x))))
    return plus(h, norm(feed_forward(norm(h))))


def sub_ln(x):
    h = plus(x, f"W({norm(attention(norm(x)))})")
    return plus(h, f"W₂({norm(inner(norm(h)))})")


def normformer(x):
    h = plus(x, norm(f"W(γ {attention(norm(x))})"))
    return plus(h, f"W₂({norm(inner(norm(h)))})")


def scaled_post_ln(factor):
    def layer(x):
        h = norm(plus(f"{factor} {x}", attention(x)))
        return norm(plus(f"{factor} {h}", feed_forward(h)))

    return layer


def bottom_to_top(x):
    h = norm(plus(x, attention(x)))
    return norm(plus(x, plus(h, feed_forward(h))))


def residual_dual(x):
    h = norm(plus(x, attention(x)))
    y = norm(plus(h, feed_forward(h)))
    dual = plus(plus(f"c {x}", f"c {attention(x)}"), f"c {feed_forward(h)}")
    return plus(y, norm(dual))


def recursive_skip(x):
    h = norm(plus(x, norm(plus(x, attention(x)))))
    return norm(plus(h, norm(plus(h, feed_forward(h)))))


def hybrid_norm(x):
    heads = ", ".join(norm(f"{name}({x})") for name in "qkv")
    n = norm(plus(x, attention(heads)))
    return plus(n, feed_forward(n))


def re_zero(x):
    h = plus(x, f"a {attention(x)}")
    return plus(h, f"a {feed_forward(h)}")


def plain(x):
    h = plus(x, attention(x))
    return plus(h, feed_forward(h))


# From the papers, for an encoder of one layer; Mix-LN of two, one of each kind.
FORMULAS = {
    "post": post_ln("x"),
    "pre": norm(pre_ln("x")),
    "sandwich": norm(sandwich("x")),
    "sub_ln": norm(sub_ln("x")),
    "normformer": norm(normformer("x")),
    "deep_norm": scaled_post_ln("α")("x"),
    "b2t": bottom_to_top("x"),
    "residual_dual": residual_dual("x"),
    "admin": scaled_post_ln("ω")("x"),
    "recursive_skip": recursive_skip("x"),
    "mix_ln": norm(pre_ln(post_ln("x"))),
    "hybrid_norm": norm(hybrid_norm("x")),
    "re_zero": re_zero("x"),
    "t_fixup": plain("x"),
}


# --- the graph ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("placement", "settings"), VARIANTS)
def test_what_is_drawn_computes_what_the_encoder_computes(placement, settings):
    encoder = randomise(build_encoder(placement, **settings))
    x = torch.randn(2, 5, SMALL["hidden_size"], generator=torch.Generator().manual_seed(0))
    *_, output = evaluate(trace(encoder), x).values()
    torch.testing.assert_close(output, encoder(x).last_hidden_state)


def test_a_label_names_what_its_node_computes():
    encoder = randomise(build_encoder("sub_ln"))
    layer, graph = encoder.layer[0], trace(encoder)
    values = evaluate(graph, torch.randn(1, 3, SMALL["hidden_size"]))
    parts = {
        "attention": lambda x: layer.attention.self(x)[0],
        "W": layer.attention.output.dense,
        "W₁, GELU": layer.intermediate,
        "W₂": layer.output.dense,
    }
    for name, node in graph.items():
        if node.label in parts:
            (source,) = node.inputs
            torch.testing.assert_close(values[name], parts.pop(node.label)(values[source]))
    assert not parts


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_each_norm_is_drawn_once_and_where_the_paper_has_it(placement):
    encoder = build_encoder(placement)
    graph = trace(encoder)
    assert formula_of(graph) == FORMULAS[placement]
    norms = [module for module in encoder.modules() if isinstance(module, NORM_CLASSES)]
    assert len(norms) == [node.kind for node in graph.values()].count("norm")
    in_layers = [module for module in encoder.layer.modules() if isinstance(module, NORM_CLASSES)]
    assert len(in_layers) == sum(n.kind == "norm" and n.layer is not None for n in graph.values())


def test_a_norm_that_moves_moves_in_the_diagram(monkeypatch):
    monkeypatch.setattr(PostNorm, "forward", lambda self, x, f: x + self.project(f(self.LayerNorm(x))))
    assert formula_of(trace(build_encoder("post"))) == pre_ln("x")


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x, f: self.LayerNorm(torch.tanh(x) + self.project(f(x))),
        lambda self, x, f: self.LayerNorm(x * self.project(f(x))),
        lambda self, x, f: self.LayerNorm(0.5 * x + self.project(f(x))),
        lambda self, x, f: self.LayerNorm(x + self.project(f(x)) + 1),
    ],
)
def test_what_has_no_sign_is_refused_and_not_left_out(forward, monkeypatch):
    monkeypatch.setattr(PostNorm, "forward", forward)
    with pytest.raises(ValueError, match="no way to draw"):
        trace(build_encoder("post"))


# --- the picture --------------------------------------------------------------------------------------------


def boxes_overlap(a, b):
    """Whether two boxes share more than an edge."""
    beside = abs(a.x - b.x) >= a.half_width + b.half_width
    return not beside and abs(a.y - b.y) < a.half_height + b.half_height


@pytest.mark.parametrize(("placement", "settings"), VARIANTS)
def test_no_box_lies_over_another_or_outside(placement, settings):
    places = list(arrange(trace(build_encoder(placement, **settings))).values())
    for i, place in enumerate(places):
        assert place.half_width <= place.x <= diagrams.WIDTH - place.half_width
        assert not any(boxes_overlap(place, other) for other in places[:i])


@pytest.mark.parametrize(("placement", "settings"), VARIANTS)
def test_no_line_runs_through_a_box_that_it_does_not_join(placement, settings):
    graph = trace(build_encoder(placement, **settings))
    places = arrange(graph)
    for end, node in graph.items():
        for start in node.inputs:
            corners = route(graph, places, start, end)
            for (x0, y0), (x1, y1) in itertools.pairwise(corners):
                assert x0 == x1 or y0 == y1
                for name in places.keys() - {start, end}:
                    box = places[name]
                    crosses_x = min(x0, x1) < box.x + box.half_width and max(x0, x1) > box.x - box.half_width
                    crosses_y = (
                        min(y0, y1) < box.y + box.half_height and max(y0, y1) > box.y - box.half_height
                    )
                    assert not (crosses_x and crosses_y), (start, end, name)


def texts_in(file):
    """What an SVG file shows, but for the ground, in any order; and what it says of itself."""
    text = file.read_text(encoding="utf-8")
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    return sorted(t for t in shown if not t.startswith("layer")), re.search("<dc:description>(.*?)<", text)[1]


def test_twice_the_same_graph_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(trace(build_encoder("hybrid_norm")), tmp_path / folder / "same.svg")
    assert (tmp_path / "a/same.svg").read_bytes() == (tmp_path / "b/same.svg").read_bytes()


def test_a_graph_in_words():
    graph = trace(build_encoder("t_fixup"))
    assert in_words(graph) == (
        "1: embeddings(); 2: attention(1); 3: +(1, 2); 4: feed-forward(3); 5: +(3, 4); 6: output(5)"
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_shipped_diagrams_are_those_of_the_modules(placement):
    graph = trace(build_encoder(placement))
    shown = sorted(node.label for node in graph.values())
    assert texts_in(FOLDER / f"{placement}.svg") == (shown, in_words(graph))


def test_nothing_else_lies_beside_the_shipped_diagrams():
    assert {file.name for file in FOLDER.iterdir()} == {f"{placement}.svg" for placement in PLACEMENTS}


# --- the page -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts():
    return generated_parts()


def test_the_page_says_what_the_code_says(parts):
    marks = {name: text for _, name, text, _ in MARK.findall(PAGE.read_text(encoding="utf-8"))}
    assert marks == parts


@pytest.mark.parametrize("change", [("method pre -->", "method prae -->"), ("cost frn -->", "cost dyt -->")])
def test_a_page_with_a_mark_too_many_or_too_few_is_refused(change):
    with pytest.raises(UserError, match=r"the page's marks and the methods differ in .*(prae|frn)"):
        refresh(PAGE.read_text(encoding="utf-8").replace(*change))


def test_the_page_shows_each_diagram_and_cites_each_paper():
    page = PAGE.read_text(encoding="utf-8")
    shown = re.findall(r'src="normalisation/(\w+)\.svg"', page)
    assert shown == list(PLACEMENTS)
    for method in (*PLACEMENTS.values(), *NORMS.values()):
        for paper in re.findall(r"arXiv (\d{4}\.\d{5})", inspect.getdoc(method)):
            assert f"[{paper}](https://arxiv.org/abs/{paper})" in page


def test_the_table_of_pairs_is_what_models_can_be_built(parts):
    header, _, *rows = (line.split("|")[1:-1] for line in parts["pairs"].splitlines() if line.startswith("|"))
    assert [cell.strip(" `") for cell in header[1:]] == list(NORMS)
    assert [row[0].strip(" `") for row in rows] == list(PLACEMENTS)
    for row in rows:
        for norm_type, cell in zip(NORMS, row[1:], strict=True):
            config = BertLnConfig(
                **SMALL, num_hidden_layers=1, norm_placement=row[0].strip(" `"), norm_type=norm_type
            )
            try:
                BertLnModel(config)
            except ValueError:
                assert cell.strip().startswith("no<sup>")
            else:
                assert cell.strip() == "yes"


def test_every_refusal_in_the_table_has_its_reason(parts):
    used, explained = (
        set(re.findall(p, parts["pairs"], re.M)) for p in (r"no<sup>(\d)<", r"^<sup>(\d)</sup> \w+")
    )
    assert used == explained != set()


# By hand: 12 layers, a norm of width w has 2 w parameters, stock BERT-base has 24 norms of 768 in its layers.
NORM, WIDE = 2 * 768, 2 * 3072


@pytest.mark.parametrize(
    ("placement", "norms", "numbers", "after", "parameters"),
    [
        ("post", 2, 2 * 768, 0, 0),
        ("pre", 2, 2 * 768, 1, NORM),
        ("sandwich", 4, 4 * 768, 1, 24 * NORM + NORM),
        ("sub_ln", 4, 3 * 768 + 3072, 1, 12 * (NORM + WIDE) + NORM),
        ("normformer", 4, 3 * 768 + 3072, 1, 12 * (NORM + WIDE + 12) + NORM),
        ("admin", 2, 2 * 768, 0, 24 * 768),
        ("hybrid_norm", 4, 4 * 768, 1, 12 * (3 * 2 * 64 - NORM) + NORM),
        ("mix_ln", 2, 2 * 768, 1, NORM),
        ("re_zero", 0, 0, 0, 12 - 25 * NORM),
    ],
)
def test_costs_are_those_counted_by_hand(placement, norms, numbers, after, parameters, parts):
    found = re.fullmatch(
        r"norms a layer: (\d+), over ([\d,]+) numbers a token; after the last layer: (\d); parameters: (.+)",
        parts[f"cost {placement}"],
    )
    counted = [int(text.replace(",", "")) for text in found.groups()[:3]]
    assert counted == [norms, numbers, after]
    stated = found[4].split()[0].replace(",", "")
    assert (0 if stated == "as" else int(stated)) == parameters


def test_what_a_norm_reads_and_how_many_parameters_it_has(parts):
    token, sequence, nothing = "over the features of a token", "over the tokens, for each feature", "none"
    for norm_type, statistics, parameters in (
        ("layer_norm", token, 1536),
        ("layer_norm_simple", token, 0),
        ("detach_norm", token, 0),
        ("ada_norm", token, 0),
        ("rms_norm", token, 768),
        ("frn", sequence, 1537),
        ("dyt", nothing, 1537),
        ("none", nothing, 0),
    ):
        expected = f"statistics: {statistics}; parameters at 768 features: {parameters:,}"
        assert parts[f"cost {norm_type}"] == expected


def test_the_fields_of_a_method_have_the_values_of_the_facts(parts):
    assert parts["fields deep_norm"] == (
        "`deep_norm_alpha` 2.213, `deep_norm_beta` 0.3195, `initializer` xavier_normal"
    )
    assert parts["fields admin"] == "`admin_omega` 2.601"
    assert parts["fields re_zero"] == "`embedding_norm` false"
    assert parts["fields pre"] == parts["fields layer_norm"] == "none"


def test_factors_of_branches_and_norms_do_not_decay(parts):
    names = set(re.findall(r"`(\w+)` \(", parts["no weight decay"]))
    assert names == {
        "alpha", "eps", "tau", "head_scale", "residual_scale", "omega", "residual_weight", "scale",
    }  # fmt: skip


# --- the command --------------------------------------------------------------------------------------------


def test_a_page_beside_the_folder_is_refreshed(tmp_path, capsys):
    stale = MARK.sub(r"\1stale\4", PAGE.read_text(encoding="utf-8"))
    (tmp_path / "normalisation.md").write_text(stale, encoding="utf-8")
    write_all(tmp_path / "normalisation")
    assert (tmp_path / "normalisation.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    for placement in PLACEMENTS:
        drawn, shipped = (folder / f"{placement}.svg" for folder in (tmp_path / "normalisation", FOLDER))
        assert texts_in(drawn) == texts_in(shipped)
    assert "14 diagrams" in capsys.readouterr().out


def test_the_command_runs_from_anywhere_and_refuses_what_it_does_not_know(tmp_path):
    command = [sys.executable, str(ROOT / "recipes/diagrams.py"), "--output_dri", "x"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 2
    assert "--output_dri" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
