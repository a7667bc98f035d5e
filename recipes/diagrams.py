"""Draw where the norms sit, from the modules themselves, and keep docs/normalisation.md true.

    python recipes/diagrams.py
    python recipes/diagrams.py --output_dir output/diagrams

It builds a small encoder for each placement, follows a symbol through the real modules (torch.fx), and draws
what was done to it as OUTPUT_DIR/PLACEMENT.svg. In OUTPUT_DIR.md, if there is one, it makes the generated
parts anew, those between `<!-- begin: NAME -->` and `<!-- end -->`: formulas, costs, fields, the table of
pairs. The rest of the page is written by hand. Twice the same code gives the same bytes. Exit codes: 0 done,
2 a mistake in options, or a page whose marks are not those of the methods that there are.
"""

import argparse
import inspect
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from torch import fx, nn
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertIntermediate, BertSelfAttention

from bert_ln import BertLnConfig, BertLnModel
from bert_ln.attention import L2Norm
from bert_ln.modeling_bert_ln import BertLnEncoder
from bert_ln.norms import NORM_CLASSES, NORMS, build_norm
from bert_ln.placements import PLACEMENTS
from recipes.command_line import Parser
from recipes.errors import UserError
from recipes.figures import DRAWING
from recipes.files import write_text
from recipes.optimization import split_parameters

SMALL = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
BASE = {name: BertLnConfig.__dataclass_fields__[name].default for name in SMALL}
# As many layers as show all that a placement does.
LAYERS: dict[str, dict[str, Any]] = {"mix_ln": {"num_hidden_layers": 2, "mix_ln_alpha": 0.5}}

# --- from modules to a graph --------------------------------------------------------------------------------

SUBLAYERS = ("attention", "feed_forward")
DRAWN_NORMS = (*NORM_CLASSES, L2Norm)
SYMBOLS = {
    "alpha": "α", "omega": "ω", "head_scale": "γ", "residual_scale": "λ", "residual_weight": "a",
    "dual_scale": "c", "query": "q", "key": "k", "value": "v",
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One thing that is done to the stream, and what was drawn of it can be computed: `apply`."""

    kind: str
    """input, norm, attention, feed_forward, projection, scale, add or output."""
    label: str
    inputs: tuple[str, ...]
    """The names of the nodes whose values `apply` takes."""
    layer: int | None
    """Counted from 0; None outside the layers."""
    apply: Callable[..., torch.Tensor]


Graph = dict[str, Node]
"""By name, each node after its inputs."""


def build_encoder(placement: str, **sizes: Any) -> BertLnEncoder:
    """The encoder that is drawn for a placement, in evaluation mode: one layer, or as few as show it."""
    config = BertLnConfig(
        norm_placement=placement, **({"num_hidden_layers": 1} | SMALL | LAYERS.get(placement, {}) | sizes)
    )
    return BertLnModel(config, add_pooling_layer=False).encoder.eval()


def trace(encoder: BertLnEncoder) -> Graph:
    """What `encoder` does to `[batch, length, hidden]`, found by running it on a symbol.

    What changes no number (dropout in evaluation, reshaping) is drawn with the node before it, and so are the
    projections around attention and feed-forward, unless something lies between.

    Raises:
        ValueError: The modules do something that has no place in a diagram.
    """
    root = _Hidden(encoder)
    graph: Graph = {}
    named: dict[fx.Node, str] = {}
    for step in _Tracer().trace(root).nodes:
        sources = [n for n in step.all_input_nodes if n in named]
        if not sources and step.op != "placeholder":
            continue  # a parameter, or something made of one
        kind, label = _describe(step, root, sources)
        inputs = tuple(named[n] for n in sources)
        node = Node(kind, label, inputs, _layer_of(step), _action(step, root, sources))
        if kind == "same" or (kind == "projection" and graph[inputs[0]].kind in SUBLAYERS):
            named[step] = _join_to_input(graph, node, step)
        else:
            named[step] = step.name
            graph[step.name] = _with_projections(graph, node) if kind == "attention" else node
    return graph


def evaluate(graph: Graph, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The value of each node for the input `x` `[batch, length, hidden]`; the last one is the output."""
    values: dict[str, torch.Tensor] = {}
    for name, node in graph.items():
        values[name] = node.apply(*(values[i] for i in node.inputs)) if node.inputs else x
    return values


class _Hidden(nn.Module):
    """An encoder as a function from tensor to tensor."""

    def __init__(self, encoder: BertLnEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the encoder."""
        return self.encoder(x).last_hidden_state


class _Symbol(fx.Proxy):
    """A symbol; one that stands for a parameter has a length. The types of numbers are not followed."""

    dtype = None

    def to(self, dtype: None) -> "_Symbol":
        return self

    def __len__(self) -> int:
        return len(dict(self.tracer.root.named_parameters())[self.node.target])


class _Tracer(fx.Tracer):
    """Looks into everything but norms, matrices and activations; attention becomes q, k, v and the rest."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (*DRAWN_NORMS, BertIntermediate)) or super().is_leaf_module(module, name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def call_module(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        def attention(x: fx.Proxy, **nothing: Any) -> tuple[fx.Proxy, None]:
            heads = (module.query(x), module.key(x), module.value(x))
            scale = (module.attention_head_size, module.scaling)
            return self.create_proxy("call_function", attend, (*heads, *scale), {}), None

        is_attention = isinstance(module, BertSelfAttention)
        return super().call_module(module, attention if is_attention else forward, args, kwargs)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, width: int, scale: float
) -> torch.Tensor:
    """Attention with heads of `width` features, without mask; all `[batch, length, hidden]`."""
    heads = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2).flatten(-2)


def _describe(step: fx.Node, root: nn.Module, sources: list[fx.Node]) -> tuple[str, str]:
    """The kind and the label of a step; the kind "same" is for what changes no number."""
    module = root.get_submodule(step.target) if step.op == "call_module" else None
    if step.op in ("placeholder", "output"):
        return ("input", "embeddings") if step.op == "placeholder" else ("output", "output")
    if isinstance(module, DRAWN_NORMS):
        return "norm", "norm"
    if isinstance(module, BertIntermediate):
        activation = type(module.intermediate_act_fn).__name__
        return "feed_forward", "W₁, " + activation.removesuffix("Activation")
    if isinstance(module, nn.Linear) or step.target is F.linear:
        return "projection", _name_of_matrix(_path(step))
    if isinstance(module, (nn.Dropout, nn.Identity)) or step.target in ("flatten", "unflatten"):
        return "same", ""
    if step.target is attend:
        return "attention", "attention"
    if step.target is operator.add and len(sources) == 2:
        return "add", "+"
    if step.target in (operator.mul, "mul") and (factor := _name_of_factor(step, root, sources)):
        return "scale", SYMBOLS.get(factor, factor)
    raise ValueError(f"no way to draw {step.format_node()} of {_path(step)}")


def _path(step: fx.Node) -> str:
    """The module in which a step happens."""
    return next(reversed(step.meta.get("nn_module_stack", {"": None})))


def _layer_of(step: fx.Node) -> int | None:
    found = re.search(r"layer\.(\d+)", _path(step))
    return int(found[1]) if found else None


def _name_of_matrix(path: str) -> str:
    return SYMBOLS.get(path.rpartition(".")[2], "W" if "attention" in path else "W₂")


def _name_of_factor(step: fx.Node, root: nn.Module, sources: list[fx.Node]) -> str | None:
    """The name of the parameter or number by which a step multiplies, in the module that does it."""
    (factor,) = (a for a in step.args if a not in sources) if len(sources) == 1 else (None,)
    if isinstance(factor, (int, float)):
        owner = vars(root.get_submodule(_path(step))).items()
        return next((name for name, value in owner if type(value) is type(factor) and value == factor), None)
    while isinstance(factor, fx.Node) and factor.op != "get_attr":
        (factor,) = factor.all_input_nodes
    return factor.target.rpartition(".")[2] if isinstance(factor, fx.Node) else None


def _action(step: fx.Node, root: nn.Module, sources: list[fx.Node]) -> Callable[..., torch.Tensor]:
    """What a step computes, as a function of the values of its sources."""

    def compute(node: fx.Node, known: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
        if node.op == "get_attr":
            return root.get_parameter(node.target)
        arguments = fx.node.map_arg(node.args, lambda n: known[n] if n in known else compute(n, known))
        if node.op == "call_module":
            return root.get_submodule(node.target)(*arguments)
        if node.op == "call_method":
            return getattr(arguments[0], node.target)(*arguments[1:])
        return arguments[0] if node.op == "output" else node.target(*arguments)

    return lambda *values: compute(step, dict(zip(sources, values, strict=True)))


def _join_to_input(graph: Graph, node: Node, step: fx.Node) -> str:
    """Let the node before do what `node` does too, and return its name."""
    (name,), before = node.inputs, graph[node.inputs[0]]
    if len(step.all_input_nodes[0].users) > 1:
        raise ValueError(f"no way to draw {step.format_node()}, whose input others read as well")
    label = "feed-forward" if node.kind == "projection" and before.kind == "feed_forward" else before.label
    first, then = before.apply, node.apply
    graph[name] = replace(before, label=label, apply=lambda *values: then(first(*values)))
    return name


def _with_projections(graph: Graph, attention: Node) -> Node:
    """Attention together with the projections to q, k and v, where nothing lies between."""
    before = [graph[name] for name in attention.inputs]
    if {node.kind for node in before} != {"projection"}:
        return attention
    for name in attention.inputs:
        del graph[name]
    inputs, then = before[0].inputs, attention.apply
    return replace(attention, inputs=inputs, apply=lambda x: then(*(node.apply(x) for node in before)))


# --- from a graph to a picture ------------------------------------------------------------------------------

# Pixels at natural size, y downwards. Three lanes: the stream, its branches, a second stream.
WIDTH, ROW, FORK = 260, 34, 16
STREAM, BRANCH, SECOND, SKIP = 46, 138, 228, 10
COLORS = {
    "norm": ("#FFD89A", "#B36B00"),
    "attention": ("#CFE6F5", "#0072B2"),
    "feed_forward": ("#CDEBDF", "#007A58"),
    "projection": ("#ECECEC", "#666666"),
    "scale": ("#FFFFFF", "#B3418A"),
    "add": ("#FFFFFF", "#222222"),
}
INK, BAND = "#222222", "#F4F5F7"
ARROW = {"arrowstyle": "-|>,head_width=0.17,head_length=0.28", "color": INK, "shrinkA": 0, "shrinkB": 0}


@dataclass(frozen=True)
class Place:
    """The centre of a node, and half of its width and height."""

    x: float
    y: float
    half_width: float
    half_height: float = 10


def longest_stream(graph: Graph) -> list[str]:
    """The longest way from input to output past all sub-layers: what is drawn as the stream."""
    ways: dict[str, list[str]] = {}
    for name, node in graph.items():
        before = [ways[i] for i in node.inputs if i in ways]
        if node.kind not in SUBLAYERS and (before or node.kind == "input"):
            ways[name] = [*max(before, key=len, default=[]), name]
    return ways[next(reversed(graph))]


def streams(graph: Graph) -> set[str]:
    """The nodes on any way from input to output past all sub-layers."""
    passed: set[str] = set()
    for name, node in graph.items():
        if node.kind == "input" or (node.kind not in SUBLAYERS and passed & set(node.inputs)):
            passed.add(name)
    needed = {next(reversed(graph))}
    for name in reversed(graph):
        if name in needed and graph[name].kind not in SUBLAYERS:
            needed.update(graph[name].inputs)
    return passed & needed


def arrange(graph: Graph) -> dict[str, Place]:
    """Where each node is drawn: rows follow the inputs, lanes the streams; layers lie below each other."""
    stream, all_streams = longest_stream(graph), streams(graph)
    rows: dict[str, int] = {}
    places = {}
    for name, node in graph.items():
        above = [row for i, row in rows.items() if i in node.inputs or graph[i].layer != node.layer]
        column = _column(graph, name)
        rows[name] = max(above, default=-1) + 1
        x = STREAM if name in stream else SECOND if name in all_streams else BRANCH + (column or 0)
        if _is_bridge(graph, name, all_streams - set(stream)):
            rows[name], x = rows[name] - 1, (BRANCH + SECOND) / 2
            places[name] = Place(x, ROW * (rows[name] + 1.5), _half_width(node, column))
        else:
            places[name] = Place(x, ROW * (rows[name] + 0.5), _half_width(node, column))
    return places


def _is_bridge(graph: Graph, name: str, second: set[str]) -> bool:
    """Whether a factor stands between a branch and the second stream: it is drawn beside what reads it."""
    readers = {reader for reader, node in graph.items() if name in node.inputs}
    return graph[name].kind == "scale" and name not in second and bool(readers) and readers <= second


def _column(graph: Graph, name: str) -> float | None:
    """How far from the middle of the branch a node is that stands beside others: on the way to q, k or v."""
    for node in graph.values():
        if node.kind == "attention" and len(node.inputs) == 3:
            for column, head in zip((-33, 0, 33), node.inputs, strict=True):
                if name == head or (name in graph[head].inputs and graph[name].kind == "projection"):
                    return column
    return None


def _half_width(node: Node, column: float | None) -> float:
    if node.kind in ("add", "scale"):
        return 9
    if node.kind in ("input", "output"):
        return 36
    return 15 if column is not None else 25 if node.kind == "norm" else 48


def route(graph: Graph, places: dict[str, Place], start: str, end: str) -> list[tuple[float, float]]:
    """The corners of the line from one node to another, the last one at its edge."""
    a, b = places[start], places[end]
    stream, all_streams = longest_stream(graph), streams(graph)
    if start in stream and end in stream and stream.index(end) > stream.index(start) + 1:  # past the others
        corners = [(a.x, a.y), (a.x, a.y + FORK), (SKIP, a.y + FORK), (SKIP, b.y), (b.x, b.y)]
    elif abs(a.x - b.x) < b.half_width:
        corners = [(a.x, a.y), (a.x, b.y)]
    elif graph[end].kind != "add" and (graph[end].kind != "scale" or start in all_streams):
        corners = [(a.x, a.y), (a.x, a.y + FORK), (b.x, a.y + FORK), (b.x, b.y)]
    else:
        corners = [(a.x, a.y), (a.x, b.y), (b.x, b.y)]
    (x, _), (end_x, end_y) = corners[-2:]
    if x == end_x:
        edge = (end_x, end_y - b.half_height)
    else:
        edge = (end_x - b.half_width if x < end_x else end_x + b.half_width, end_y)
    return [(a.x, min(a.y + a.half_height, corners[1][1])), *corners[1:-1], edge]


def draw(graph: Graph) -> Figure:
    """The diagram, `WIDTH` pixels wide."""
    places = arrange(graph)
    height = max(place.y for place in places.values()) + ROW / 2
    with rc_context(DRAWING):
        figure = Figure(figsize=(WIDTH / 96, height / 96), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        axes.set_axis_off()
        _draw_bands(axes, graph, places)
        for end, node in graph.items():
            for start in node.inputs:
                _draw_line(axes, route(graph, places, start, end))
        for name, node in graph.items():
            _draw_node(axes, node, places[name])
    return figure


def _draw_bands(axes: Axes, graph: Graph, places: dict[str, Place]) -> None:
    """A grey ground behind each layer."""
    layers = sorted({node.layer for node in graph.values()} - {None})
    for layer in layers:
        ys = [places[name].y for name, node in graph.items() if node.layer == layer]
        top, bottom = min(ys) - FORK - 3, max(ys) + FORK - 5
        box = FancyBboxPatch(
            (3, top), WIDTH - 6, bottom - top, boxstyle="round,pad=0,rounding_size=4", fc=BAND, ec="none"
        )
        axes.add_patch(box)
        label = f"layer {layer + 1}" if len(layers) > 1 else "layer"
        _write(axes, 180, max(ys), label, color="#777777")


def _draw_line(axes: Axes, corners: list[tuple[float, float]]) -> None:
    for start, end in pairwise(corners):
        axes.plot(*zip(start, end, strict=True), color=INK, linewidth=1, solid_capstyle="round", zorder=2)
    axes.annotate("", corners[-1], corners[-2], arrowprops=ARROW, zorder=3)


def _draw_node(axes: Axes, node: Node, place: Place) -> None:
    if node.kind in COLORS:
        fill, edge = COLORS[node.kind]
        style = {"facecolor": fill, "edgecolor": edge, "linewidth": 1, "zorder": 4}
        if node.kind in ("add", "scale"):
            axes.add_patch(Circle((place.x, place.y), place.half_width, **style))
        else:
            corner = (place.x - place.half_width, place.y - place.half_height)
            size = (2 * place.half_width, 2 * place.half_height)
            axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=3", **style))
    _write(axes, place.x, place.y, node.label, size=9.5 if place.half_width == 15 else 11)


def _write(axes: Axes, x: float, y: float, text: str, size: float = 11, color: str = INK) -> None:
    axes.text(x, y, text, fontsize=size * 0.75, color=color, ha="center", va="center_baseline", zorder=5)


def in_words(graph: Graph) -> str:
    """The same as a text, which goes into the file: that of an old diagram differs."""
    numbers = {name: number for number, name in enumerate(graph, 1)}
    steps = (
        f"{numbers[name]}: {node.label}({', '.join(str(numbers[i]) for i in node.inputs)})"
        for name, node in graph.items()
    )
    return "; ".join(steps)


def save(graph: Graph, file: Path) -> None:
    """Draw `graph` into an SVG file, the same bytes each time."""
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) | {"Description": in_words(graph)}
    with rc_context(DRAWING | {"svg.hashsalt": file.stem}):
        draw(graph).savefig(file, metadata=metadata)


# --- what the page says of a method -------------------------------------------------------------------------

MARK = re.compile(r"(<!-- begin: ([^>]+) -->)(.*?)(<!-- end -->)", re.DOTALL)


def refresh(page: str) -> str:
    """The text of the page with its generated parts made anew.

    Raises:
        UserError: A mark names nothing that is generated, or something generated has no mark.
    """
    parts, marks = generated_parts(), {name for _, name, _, _ in MARK.findall(page)}
    if strays := sorted(marks ^ set(parts)):
        raise UserError(f"the page's marks and the methods differ in {', '.join(strays)}")
    return MARK.sub(lambda mark: mark[1] + parts[mark[2]] + mark[4], page)


def generated_parts() -> dict[str, str]:
    """What is generated, by the names of the marks."""
    parts = {"pairs": pairs(), "no weight decay": without_decay()}
    for name, method in (PLACEMENTS | NORMS).items():
        parts[f"method {name}"] = described(method)
        parts[f"fields {name}"] = fields(name)
    parts |= {f"cost {name}": placement_cost(name) for name in PLACEMENTS}
    return parts | {f"cost {name}": norm_cost(name) for name in NORMS}


def described(method: type[nn.Module]) -> str:
    """Name and formula of a method, from its docstring."""
    title, _, formula = " ".join(inspect.getdoc(method).split("\n\n")[0].split()).partition(": ")
    return f"**{title}**: {formula}"


def fields(name: str) -> str:
    """The fields of the config that belong to a method, with their values at 12 layers."""
    option = "norm_placement" if name in PLACEMENTS else "norm_type"
    config = BertLnConfig(**{option: name})
    own = [field for field in config.__dataclass_fields__ if field.startswith(f"{name}_")]
    stated = {field: _plain(getattr(config, field)) for field in own if field != "layer_norm_eps"}
    if option == "norm_placement" and config.initializer != "normal":
        stated["initializer"] = config.initializer
    if option == "norm_placement" and not config.embedding_norm:
        stated["embedding_norm"] = "false"
    return ", ".join(f"`{field}` {value}" for field, value in stated.items()) or "none"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.4g}"


def placement_cost(placement: str) -> str:
    """Norms, the numbers that pass through them, and parameters beside BERT's, at the size of BERT-base."""
    with torch.device("meta"):
        encoder = build_encoder(placement, **BASE)
        graph = trace(encoder)
        values = evaluate(graph, torch.empty(1, 1, BASE["hidden_size"]))
    norms = {name: node.layer for name, node in graph.items() if node.kind == "norm"}
    inside = [values[name].numel() for name, layer in norms.items() if layer is not None]
    layers = len(encoder.layer)
    parameters, stock = parameters_at_base(placement), parameters_at_base("post")
    more = "as BERT" if parameters == stock else f"{parameters - stock:+,} ({parameters / stock - 1:+.3%})"
    return (
        f"norms a layer: {len(inside) // layers}, over {sum(inside) // layers:,} numbers a token; "
        f"after the last layer: {len(norms) - len(inside)}; parameters: {more}"
    )


@cache
def parameters_at_base(placement: str) -> int:
    """The number of parameters of the encoder at the size of BERT-base."""
    with torch.device("meta"):
        return BertLnModel(BertLnConfig(norm_placement=placement)).num_parameters()


def norm_cost(norm_type: str) -> str:
    """Parameters, and which numbers an output depends on, found by changing one of them."""
    norm = build_norm(BertLnConfig(norm_type=norm_type), BASE["hidden_size"])
    x = torch.randn(1, 3, BASE["hidden_size"], generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 0, 0] += 1
    depends = (norm(x) != norm(changed))[0]  # [token, feature]
    statistics = "over the features of a token" if depends[0, 1:].any() else "none"
    statistics = "over the tokens, for each feature" if depends[1:, 0].any() else statistics
    parameters = sum(parameter.numel() for parameter in norm.parameters())
    return f"statistics: {statistics}; parameters at 768 features: {parameters:,}"


def pairs() -> str:
    """The table of all pairs of placement and norm; for those that are refused, why."""
    reasons: dict[str, int] = {}
    lines = ["| | " + " | ".join(f"`{norm}`" for norm in NORMS) + " |", "|---|" + ":---:|" * len(NORMS)]
    for placement in PLACEMENTS:
        cells = []
        for norm in NORMS:
            reason = _refusal(placement, norm)
            cells.append(f"no<sup>{reasons.setdefault(reason, len(reasons) + 1)}</sup>" if reason else "yes")
        lines.append(f"| `{placement}` | " + " | ".join(cells) + " |")
    notes = [line for reason, number in reasons.items() for line in ("", f"<sup>{number}</sup> {reason}.")]
    return "\n" + "\n".join([*lines, *notes]) + "\n"


def _refusal(placement: str, norm: str) -> str | None:
    """Why no model is built for a pair; None if one is."""
    try:
        BertLnConfig(norm_placement=placement, norm_type=norm).check_buildable()
    except ValueError as error:
        return str(error).partition(": ")[2]
    return None


def without_decay() -> str:
    """The parameters, besides biases and the gains of norms, that an optimiser does not decay."""
    methods = [("norm_placement", name) for name in PLACEMENTS] + [("norm_type", name) for name in NORMS]
    methods += [("qk_norm", "l2")]
    found = []
    for option, name in methods:
        exempt = _names_without_decay(**{option: name})
        found += [f"`{parameter}` ({option} `{name}`)" for parameter in exempt - {"weight", "bias"}]
    return ", ".join(sorted(found))


def _names_without_decay(**method: Any) -> set[str]:
    """Last parts of the names, with all switches of the method on."""
    config = BertLnConfig(**SMALL, num_hidden_layers=1, **method)
    (name,) = method.values()
    for field, default in config.__dataclass_fields__.items():
        if field.startswith(f"{name}_") and default.default is False:
            setattr(config, field, True)
    model = BertLnModel(config)
    exempt = {id(parameter) for parameter in split_parameters(model)[1]}
    return {n.rpartition(".")[2] for n, parameter in model.named_parameters() if id(parameter) in exempt}


# --- the command --------------------------------------------------------------------------------------------


def main() -> int:
    """Parse, call, done."""
    try:
        write_all(parse_command_line().output_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """What was asked for.

    Raises:
        UserError: A word that is no option.
    """
    parser = Parser(
        prog="recipes/diagrams.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = Path(__file__).parent.parent / "docs" / "normalisation"
    parser.add_argument("--output_dir", type=Path, default=default, help="[docs/normalisation]")
    return parser.parse_args(argv)


def write_all(output_dir: Path) -> None:
    """Draw all placements into `output_dir`, and refresh the page beside it, if there is one."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for placement in PLACEMENTS:
        save(trace(build_encoder(placement)), output_dir / f"{placement}.svg")
    print(f"{len(PLACEMENTS)} diagrams in {output_dir}")
    page = output_dir.with_suffix(".md")
    if page.exists():
        write_text(page, refresh(page.read_text(encoding="utf-8")))
        print(f"generated parts of {page}")


if __name__ == "__main__":
    sys.exit(main())
