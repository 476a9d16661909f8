# ruff: noqa: E501 (prose and templates in strings)
"""Questions of the four assignments. Each is a function of a random generator that returns cells.

Constants, maps, shapes and conventions are drawn anew for every seed. A hidden test holds the
drawn constants and works the answer out from them, by another way than the solution where there
is one (automatic differentiation, a brute-force sum).
"""

from random import Random

HEAD = """import torch

torch.manual_seed(0)
"""
MATH = "import math\n\n"


def cell(kind: str, source: str, name: str = "", points: int = 0, **flags) -> dict:
    "A cell as `variants.py` writes it."
    return {"kind": kind, "source": source.strip("\n"), "name": name, "points": points, **flags}


def text(source: str) -> dict:
    "Prose, which students cannot change."
    return cell("markdown", source)


def given(name: str, source: str) -> dict:
    "Code that students get and cannot change."
    return cell("code", source, name, locked=True)


def answer(name: str, source: str) -> dict:
    "Code that students write, with a solution between the markers."
    return cell("code", source, name, solution=True)


def tests(name: str, points: int, visible: str, hidden: str) -> dict:
    "Tests: students see the first part; the second is put in when their work is graded."
    gap = "\n\n\n" if hidden.lstrip().startswith("def ") else "\n"
    hidden = f"### BEGIN HIDDEN TESTS\n{hidden.strip()}\n### END HIDDEN TESTS"
    return cell("code", visible.strip() + gap + hidden, name, points, locked=True, grade=True)


def essay(name: str, points: int, model_answer: str) -> dict:
    "An answer in words, graded by hand; what stands here is for the person who grades."
    return cell("markdown", model_answer, name, points, solution=True, grade=True)


def number(rng: Random, low: float, high: float, digits: int = 2) -> float:
    "A constant with few digits, as one writes it on a board."
    return round(rng.uniform(low, high), digits)


# 1. change of variables and couplings (lessons 01 and 02)

MAPS = (  # formula, code of the map, code of its slope; a, b, k are filled in
    (
        r"{a}\,x + {b}\tanh({k}\,x)",
        "{a} * x + {b} * torch.tanh({k} * x)",
        "{a} + {b} * {k} / torch.cosh({k} * x) ** 2",
    ),
    (
        r"{a}\,x + {b}\sinh({k}\,x)",
        "{a} * x + {b} * torch.sinh({k} * x)",
        "{a} + {b} * {k} * torch.cosh({k} * x)",
    ),
    (
        r"{a}\,x + {b}\,(x - {k})^3",
        "{a} * x + {b} * (x - {k}) ** 3",
        "{a} + 3 * {b} * (x - {k}) ** 2",
    ),
    (
        r"{a}\,x + {b}\arctan({k}\,x)",
        "{a} * x + {b} * torch.atan({k} * x)",
        "{a} + {b} * {k} / (1 + ({k} * x) ** 2)",
    ),
)


def map_of_the_line(rng: Random) -> list[dict]:
    "A density under a map without a closed inverse, and its inverse by bisection."
    constants = {"a": number(rng, 0.8, 1.4), "b": number(rng, 0.3, 0.9), "k": number(rng, 0.5, 1.2)}
    formula, code, slope = (part.format(**constants) for part in rng.choice(MAPS))
    inside = rng.choice((0.25, 0.5, 1.0))
    return [
        text(rf"""## A map of the line

Noise $z$ is standard normal, and data $x$ are tied to it by

$$z = f(x) = {formula}.$$

Write $f$ and the log-density of $x$, in nats. Both take and return tensors of shape `(N,)`, in
double precision."""),
        answer(
            "map",
            f"""def to_noise(x):
    "z = f(x), `(N,)`."
    ### BEGIN SOLUTION
    return {code}
    ### END SOLUTION


def log_density(x):
    "log p(x) in nats, `(N,)`."
    ### BEGIN SOLUTION
    slope = {slope}
    return -0.5 * to_noise(x) ** 2 - 0.5 * math.log(2 * math.pi) + slope.log()
    ### END SOLUTION""",
        ),
        tests(
            "test-map",
            3,
            """grid = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
area = torch.trapezoid(log_density(grid).exp(), grid)
assert abs(area - 1) < 1e-3, f"a density has area 1, this one {area:.4f}"
""",
            f"""x = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
z = {code}
(slope,) = torch.autograd.grad(z.sum(), x)
right = torch.distributions.Normal(0.0, 1.0).log_prob(z) + slope.log()
assert torch.allclose(to_noise(x), z), "another map"
assert torch.allclose(log_density(x), right), "another density"
""",
        ),
        text(f"""Now the way back. $f$ rises everywhere, but there is no handy formula for its inverse. Write one that
halves an interval until it is short, and use it to find the probability that $|x|$ is less than
{inside}. (The noise knows the answer: which noise comes from $x$ in this interval?)"""),
        answer(
            "inverse",
            f"""def to_data(z):
    "The x with f(x) = z, `(N,)`, to 1e-8; |x| is less than 50."
    ### BEGIN SOLUTION
    low, high = torch.full_like(z, -50.0), torch.full_like(z, 50.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = to_noise(middle) < z
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
    ### END SOLUTION


def probability_inside():
    "The probability that |x| < {inside}, a float."
    ### BEGIN SOLUTION
    ends = to_noise(torch.tensor([-{inside}, {inside}], dtype=torch.float64))
    below = torch.special.ndtr(ends)
    return (below[1] - below[0]).item()
    ### END SOLUTION""",
        ),
        tests(
            "test-inverse",
            3,
            """z = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
assert torch.allclose(to_noise(to_data(z)), z, atol=1e-6), "there and back is not the identity"
""",
            f"""x = torch.linspace(-2, 2, 41, dtype=torch.float64)
found = to_data({code})
assert torch.allclose(found, x, atol=1e-6), "not the inverse of f"
x = torch.linspace(-{inside}, {inside}, 20_001, dtype=torch.float64, requires_grad=True)
z = {code}
(slope,) = torch.autograd.grad(z.sum(), x)
p = torch.distributions.Normal(0.0, 1.0).log_prob(z).exp() * slope
share = torch.trapezoid(p, x).item()
assert abs(probability_inside() - share) < 1e-5, "the area under p(x) between the ends differs"
""",
        ),
    ]


FORMS = (  # formula, code of a step, code of the step back, sign of the log-determinant
    (r"z_j = x_j\,e^{s_j} + t_j", "{x} * s.exp() + t", "({z} - t) * (-s).exp()", ""),
    (r"z_j = (x_j - t_j)\,e^{-s_j}", "({x} - t) * (-s).exp()", "{z} * s.exp() + t", "-"),
    (r"z_j = (x_j + t_j)\,e^{s_j}", "({x} + t) * s.exp()", "{z} * (-s).exp() - t", ""),
)


def coupling(rng: Random) -> list[dict]:
    "An affine coupling with bounded log-scales."
    dims = rng.choice((5, 6, 7))
    kept = sorted(rng.sample(range(dims), rng.choice((2, 3))))
    moved = [d for d in range(dims) if d not in kept]
    bound = number(rng, 1.2, 2.8, 1)
    formula, step, back, sign = rng.choice(FORMS)
    step, back = step.format(x="x[:, moved]"), back.format(z="z[:, moved]")
    return [
        text(rf"""## An affine coupling

Points have {dims} numbers, counted from 0. Numbers {kept} pass unchanged. For every other number $j$

$${formula}, \qquad s = {bound}\,\tanh(r / {bound}),$$

where the network gives $r$ and $t$ from the numbers that pass, in their order: `r, t = network(kept)`
with `kept` of shape `(N, {len(kept)})` and `r`, `t` of shape `(N, {len(moved)})`."""),
        answer(
            "coupling",
            f"""def forward(x, network):
    "z `(N, {dims})` and log|det ∂z/∂x| `(N,)` of points x `(N, {dims})`."
    ### BEGIN SOLUTION
    kept, moved = {kept}, {moved}
    r, t = network(x[:, kept])
    s = {bound} * torch.tanh(r / {bound})
    z = x.clone()
    z[:, moved] = {step}
    return z, {sign}s.sum(dim=1)
    ### END SOLUTION


def inverse(z, network):
    "The points x `(N, {dims})` that `forward` maps to z."
    ### BEGIN SOLUTION
    kept, moved = {kept}, {moved}
    r, t = network(z[:, kept])
    s = {bound} * torch.tanh(r / {bound})
    x = z.clone()
    x[:, moved] = {back}
    return x
    ### END SOLUTION""",
        ),
        tests(
            "test-coupling",
            4,
            f"""weights = torch.randn({len(kept)}, {2 * len(moved)}, dtype=torch.float64)


def network(kept):
    return (3 * torch.sin(kept @ weights)).chunk(2, dim=1)


x = torch.randn(4, {dims}, dtype=torch.float64)
z, logdet = forward(x, network)
assert z.shape == x.shape and logdet.shape == (4,)
assert torch.allclose(inverse(z, network), x), "there and back is not the identity"
""",
            f"""kept, moved = {kept}, {moved}
r, t = network(x[:, kept])
s = {bound} * torch.tanh(r / {bound})
right = x.clone()
right[:, moved] = {step}
assert torch.allclose(z, right), "another map"
for point, value in zip(x, logdet):
    jacobian = torch.autograd.functional.jacobian(lambda v: forward(v[None], network)[0][0], point)
    assert abs(jacobian.det().abs().log() - value) < 1e-8, "not the log-determinant"
""",
        ),
    ]


def bits(rng: Random) -> list[dict]:
    "Bits per dimension for other images and another scaling."
    side, channels = rng.choice((8, 12, 16, 20, 24)), rng.choice((1, 2, 3))
    levels = rng.choice((16, 32, 64, 128, 200))
    low, high = rng.choice(((-1, 1), (0, 1), (-2, 2), (0, 4)))
    return [
        text(f"""## Bits per dimension

Images have {channels} × {side} × {side} pixels with {levels} grey levels. Each level owns a bin of equal
width, and the bins fill the interval from {low} to {high}. Uniform noise spreads each pixel over its bin.
A flow reports the mean of $-\\log p(x)$ over test images, in nats per image, for values in this
interval. How many bits per dimension is that, for the {levels} levels?"""),
        answer(
            "bits",
            f"""def bits_per_dim(nll):
    "Bits per dimension of a mean negative log-likelihood in nats per image."
    ### BEGIN SOLUTION
    bin_width = {high - low} / {levels}
    return nll / ({channels * side * side} * math.log(2)) - math.log2(bin_width)
    ### END SOLUTION""",
        ),
        tests(
            "test-bits",
            2,
            'assert bits_per_dim(1.0) > bits_per_dim(0.0), "less likely images need more bits"',
            f"""dims = {channels} * {side} * {side}
uniform = dims * math.log({high} - {low})  # nats: an even density on the interval
assert abs(bits_per_dim(uniform) - math.log2({levels})) < 1e-6
halved = dims * (math.log({high} - {low}) - math.log(2))  # twice the density everywhere
assert abs(bits_per_dim(halved) - math.log2({levels}) + 1) < 1e-6
""",
        ),
    ]


ESSAYS_1 = (
    (
        "A classmate trains a flow without the log-determinant and reports that the loss went to zero. "
        "What did the flow learn, and why does the log-determinant prevent it?",
        "It maps all data to z near 0, where the base density is highest. The map shrinks space; the "
        "log-determinant charges exactly for that, so that the density keeps area one.",
    ),
    (
        "Two papers report 3.2 and 3.4 bits per dimension on the same data set. Name three things to "
        "know before the first may be called better.",
        "Same images and size; same levels and dequantisation (uniform or learned, draws per image); same "
        "split; labels or not; seeds or the spread over images. Any three with a reason.",
    ),
    (
        "Why does a single coupling, however large its network, not become a good model of images? "
        "What do several couplings in a row change?",
        "Numbers that pass keep their own distribution, whatever the network says. The next coupling "
        "changes those; only in alternation does every number depend on all others.",
    ),
)


# 2. autoregressive flows and TARFlow (lessons 03, 07 and 08)


def masks(rng: Random) -> list[dict]:
    "MADE for a random order."
    dims = rng.choice((5, 6, 7))
    order = rng.sample(range(dims), dims)
    hidden = (dims + rng.randint(0, 4), dims + rng.randint(0, 4))
    return [
        text(f"""## Masks for a given order

A network with two hidden layers of {hidden[0]} and {hidden[1]} units reads {dims} numbers and gives one output
for each of them. The numbers are read in the order {order}: number {order[0]} first. Output $d$ may depend on the numbers that
are read before $d$, and must be reached from each of them."""),
        answer(
            "masks",
            f"""def masks():
    "Three 0/1 tensors of shape (out, in): input to hidden, hidden to hidden, hidden to output."
    ### BEGIN SOLUTION
    order, sizes = {order}, {hidden}
    rank = torch.tensor([order.index(d) for d in range({dims})])
    first, second = (torch.arange(size) % ({dims} - 1) for size in sizes)
    layers = (
        rank[None, :] <= first[:, None],
        first[None, :] <= second[:, None],
        second[None, :] < rank[:, None],
    )
    return tuple(layer.double() for layer in layers)
    ### END SOLUTION""",
        ),
        tests(
            "test-masks",
            3,
            f"""a, b, c = (m.double() for m in masks())
assert a.shape == {(hidden[0], dims)} and c.shape == {(dims, hidden[1])}
assert b.shape == {(hidden[1], hidden[0])}
""",
            f"""order, reached = {order}, c @ b @ a
assert all(((m == 0) | (m == 1)).all() for m in (a, b, c)), "a mask holds zeros and ones"
for d in range({dims}):
    allowed = set(order[: order.index(d)])
    found = set(reached[d].nonzero().flatten().tolist())
    assert found == allowed, f"output {{d}} is reached from {{found}}"
""",
        ),
    ]


BLOCKS = (  # formula, code of the step, code of the step back, sign of α in the log-determinant
    (
        r"y_t = (x_t - \mu_t)\,e^{-\alpha_t}",
        "({x} - mu) * (-alpha).exp()",
        "{y} * alpha.exp() + mu",
        -1,
    ),
    (
        r"y_t = x_t\,e^{\alpha_t} + \mu_t",
        "{x} * alpha.exp() + mu",
        "({y} - mu) * (-alpha).exp()",
        1,
    ),
    (
        r"y_t = (x_t + \mu_t)\,e^{-\alpha_t}",
        "({x} + mu) * (-alpha).exp()",
        "{y} * alpha.exp() - mu",
        -1,
    ),
)


def token_block(rng: Random) -> list[dict]:
    "A causal block over tokens with clipped outputs, and its serial inverse."
    tokens, size = rng.choice((5, 6, 7, 8)), rng.choice((2, 3, 4))
    clip, pace = number(rng, 0.4, 0.9), number(rng, 0.5, 1.5)
    backwards = rng.choice((True, False))
    formula, step, back, sign = rng.choice(BLOCKS)
    right, step, back = step.format(x="read"), step.format(x="x"), back.format(y="y[:, t]")
    back = back.replace("alpha", "alpha[:, t]").replace("mu", "mu[:, t]")
    turn = ".flip(1)" if backwards else ""
    reading = "from the last to the first" if backwards else "from the first to the last"
    minus = "-" if sign < 0 else ""
    return [
        text(rf"""## A block over tokens, and back

A block maps {tokens} tokens of {size} values. It reads the tokens {reading}. With the tokens in reading order

$${formula}, \qquad (\alpha, \mu) = \text{{clip}}\big(\text{{conditioner}}(x),\, -{clip},\, {clip}\big),$$

and the result is put back into the order of the image. `conditioner` is given: its outputs for a token depend on the
tokens that come before it in the tensor that it gets. The block changes the first token that is read, too."""),
        given(
            "conditioner",
            f"""def conditioner(x):
    "α and μ, each `(N, T, D)`, of tokens `(N, T, D)`: those of token t depend on tokens before t."
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1].cumsum(dim=1)], dim=1)
    mixed = torch.sin({pace} * before) + 0.5 * before.flip(2)
    return mixed + 0.2, torch.cos(mixed)
""",
        ),
        answer(
            "block",
            f"""def block_forward(x):
    "y `(N, {tokens}, {size})` and log|det ∂y/∂x| `(N,)`, summed over all values."
    ### BEGIN SOLUTION
    x = x{turn}
    alpha, mu = (value.clamp(-{clip}, {clip}) for value in conditioner(x))
    y = {step}
    return y{turn}, {minus}alpha.sum(dim=(1, 2))
    ### END SOLUTION


def block_inverse(y):
    "The x that `block_forward` maps to y, with at most {tokens} calls of `conditioner`."
    ### BEGIN SOLUTION
    y = y{turn}
    x = torch.zeros_like(y)
    for t in range({tokens}):
        alpha, mu = (value.clamp(-{clip}, {clip}) for value in conditioner(x))
        x[:, t] = {back}
    return x{turn}
    ### END SOLUTION""",
        ),
        tests(
            "test-block",
            5,
            f"""x = torch.randn(3, {tokens}, {size}, dtype=torch.float64)
y, logdet = block_forward(x)
assert y.shape == x.shape and logdet.shape == (3,)
assert torch.allclose(block_inverse(y), x), "there and back is not the identity"
""",
            f"""read = x{turn}
alpha, mu = (value.clamp(-{clip}, {clip}) for value in conditioner(read))
right = ({right}){turn}
assert torch.allclose(y, right), "another map"
for image, value in zip(x, logdet):
    jacobian = torch.autograd.functional.jacobian(
        lambda v: block_forward(v.reshape(1, {tokens}, {size}))[0].flatten(), image.flatten()
    )
    assert abs(jacobian.det().abs().log() - value) < 1e-8, "not the log-determinant"
calls, given_conditioner = [], conditioner


def conditioner(x):
    calls.append(len(x))
    return given_conditioner(x)


assert torch.allclose(block_inverse(right), x), "not the inverse of the block"
assert 0 < len(calls) <= {tokens}, f"{{len(calls)}} calls for {tokens} tokens"
conditioner = given_conditioner
""",
        ),
    ]


def whole_flow(rng: Random) -> list[dict]:
    "A TARFlow of the package, its shapes, its serial steps and its round trip."
    patch = rng.choice((2, 3, 4))
    side, channels = patch * rng.choice((2, 3)), rng.choice((1, 2, 3))
    blocks, classes, width = rng.choice((2, 3, 4)), rng.choice((3, 4, 5)), rng.choice((16, 24))
    return [
        text(f"""## A whole flow from the package

Build a `TARFlow` for images of {channels} × {side} × {side} pixels, patches of {patch} × {patch}, {blocks} blocks and
{classes} classes, each block a transformer of width {width} with 1 layer and heads of 8. Say how many tokens an image has,
how many values each token has, and how many serial steps the exact inverse of the flow takes for one image. Then
measure the round trip: images to noise with the flow, back with the exact inverse."""),
        given(
            "package",
            """from bitflow_edu.exact_inverse import exact_inverse
from bitflow_edu.tarflow import TARFlow, TARFlowConfig
from bitflow_edu.transformer import TransformerConfig
""",
        ),
        answer(
            "flow",
            f"""def build():
    "The flow, in evaluation mode: no label is dropped."
    ### BEGIN SOLUTION
    transformer = TransformerConfig(width={width}, num_layers=1, head_dim=8)
    shape = dict(image_size={side}, channels={channels}, patch_size={patch})
    config = TARFlowConfig(**shape, num_classes={classes}, num_blocks={blocks}, transformer=transformer)
    return TARFlow(config).eval()
    ### END SOLUTION


def sizes():
    "Tokens of an image, values of each token, serial steps of the exact inverse."
    ### BEGIN SOLUTION
    tokens = ({side} // {patch}) ** 2
    return tokens, {channels} * {patch}**2, {blocks} * (tokens - 1)
    ### END SOLUTION


def round_trip_error(F, x, c):
    "The largest difference, over all pixels, between x and what comes back, a float."
    ### BEGIN SOLUTION
    with torch.no_grad():
        z = F(x, c).states[-1]
        return (exact_inverse(F, z, c) - x).abs().max().item()
    ### END SOLUTION""",
        ),
        tests(
            "test-flow",
            3,
            """F = build()
assert isinstance(F, TARFlow) and not F.training
tokens, values, steps = sizes()
""",
            f"""for p in F.parameters():  # at the start a flow is the identity: shake it
    p.data += 0.05 * torch.randn_like(p)
x = torch.randn(2, {channels}, {side}, {side})
c = torch.tensor([0, {classes - 1}])
states = F(x, c).states
assert states[-1].shape == (2, tokens, values), "the flow has other tokens"
assert len(states) == {blocks} + 1 and F.cfg.num_classes == {classes}
assert F.cfg.transformer.width == {width}
assert steps == {blocks} * (states[-1].shape[1] - 1), "a step for each token but one, in each block"
for scale in (1, 3):
    error = (exact_inverse(F, F(scale * x, c).states[-1], c) - scale * x).abs().max().item()
    assert 0.2 * error < round_trip_error(F, scale * x, c) < 5 * error, "the largest difference"
""",
        ),
    ]


ESSAYS_2 = (
    (
        "Density in one pass, samples in many. Say why a flow that is trained by maximum likelihood is built "
        "this way round and not the other, and what an IAF gives up.",
        "Training evaluates densities of data millions of times and never samples, so that direction must be "
        "parallel. An IAF samples in one pass, but the density of given data is serial, so it cannot be "
        "trained this way at this cost.",
    ),
    (
        "A KV cache makes the exact inverse much cheaper and leaves the number of serial steps as it is. "
        "Explain both halves of this sentence.",
        "Keys and values of earlier tokens do not change, so each step computes one new token instead of all. "
        "But token t needs the values of tokens before t, so steps still wait for each other: T − 1 per block.",
    ),
    (
        "Why does TARFlow train on images with added noise, and what must be done to its samples because of it?",
        "Without noise the likelihood can grow without bound on flat or discrete values and samples are "
        "poor. The flow then models noisy images, so samples carry noise of that size; one step along the "
        "score (Tweedie), or a learned block, removes it.",
    ),
)


# 3. learning the inverse (lessons 10 to 12)


def best_inverse(rng: Random) -> list[dict]:
    "The best guess of clean data from noise, for data with a few values."
    count = rng.choice((3, 4))
    atoms = sorted(number(rng, -1.5, 1.5) for _ in range(count))
    shares = [rng.randint(1, 5) for _ in range(count)]
    sigma, shift, scale = number(rng, 0.25, 0.6), number(rng, -0.5, 0.5), number(rng, 0.5, 1.5)
    return [
        text(rf"""## What the best inverse is

Clean data $x$ take the values {atoms} with probabilities proportional to {shares}. The flow sees
$\tilde x = x + \sigma\varepsilon$ with $\sigma = {sigma}$ and maps it to $z = F(\tilde x) = (\tilde x - ({shift})) / {scale}$.
Write the exact inverse $F^{{-1}}(z)$, and the function of $z$ that comes closest to the *clean* $x$ in the mean squared sense."""),
        answer(
            "best",
            f"""def exact(z):
    "x̃ of noise z, `(N,)`."
    ### BEGIN SOLUTION
    return {shift} + {scale} * z
    ### END SOLUTION


def best(z):
    "The guess of x with the smallest mean squared error, `(N,)`."
    ### BEGIN SOLUTION
    atoms = torch.tensor({atoms}, dtype=z.dtype)
    shares = torch.tensor({shares}, dtype=z.dtype)
    distance = (exact(z)[:, None] - atoms) ** 2
    weights = torch.softmax(shares.log() - distance / (2 * {sigma}**2), dim=1)
    return weights @ atoms
    ### END SOLUTION""",
        ),
        tests(
            "test-best",
            4,
            f"""atoms = torch.tensor({atoms}, dtype=torch.float64)
shares = torch.tensor({shares}, dtype=torch.float64)
x = atoms[torch.multinomial(shares, 20_000, replacement=True)]
z = (x + {sigma} * torch.randn_like(x) - ({shift})) / {scale}
mse_exact, mse_best = ((guess(z) - x).square().mean() for guess in (exact, best))
assert mse_best < mse_exact, "the best guess must beat the exact inverse"
""",
            f"""grid = torch.linspace(-3, 3, 61, dtype=torch.float64)
noisy = {shift} + {scale} * grid
assert torch.allclose(exact(grid), noisy), "another flow"
joint = torch.stack(
    [share * (-((noisy - a) ** 2) / (2 * {sigma}**2)).exp() for a, share in zip(atoms, shares)]
)
assert torch.allclose(best(grid), (joint * atoms[:, None]).sum(dim=0) / joint.sum(dim=0))
""",
        ),
    ]


def tweedie(rng: Random) -> list[dict]:
    "The score of noisy data and the denoising step."
    dims, count = rng.choice((2, 3)), rng.choice((3, 4))
    points = [[number(rng, -1, 1) for _ in range(dims)] for _ in range(count)]
    sigma = number(rng, 0.3, 0.7)
    return [
        text(rf"""## One step along the score

The data set has {count} equally likely points with {dims} numbers each: {points}. Noise with $\sigma = {sigma}$ is added.
Write the score $\nabla\log p(\tilde x)$ of the noisy data as a formula, without automatic differentiation, and the
denoising step that follows from it."""),
        answer(
            "score",
            f"""def score(noisy):
    "∇ log p at noisy points `(N, {dims})`, the same shape."
    ### BEGIN SOLUTION
    points = {points}
    gap = torch.tensor(points, dtype=noisy.dtype)[None] - noisy[:, None]
    weights = torch.softmax(-gap.square().sum(dim=2) / (2 * {sigma}**2), dim=1)
    return (weights[:, :, None] * gap).sum(dim=1) / {sigma}**2
    ### END SOLUTION


def denoised(noisy):
    "E[x | x̃], `(N, {dims})`."
    ### BEGIN SOLUTION
    return noisy + {sigma}**2 * score(noisy)
    ### END SOLUTION""",
        ),
        tests(
            "test-score",
            4,
            f"""far = 100 * torch.ones(1, {dims}, dtype=torch.float64)
assert (score(far) < 0).all(), "far away the score points back to the data"
""",
            f"""points = {points}
points = torch.tensor(points, dtype=torch.float64)
noisy = torch.randn(50, {dims}, dtype=torch.float64, requires_grad=True)
distance = (noisy[:, None] - points).square().sum(dim=2)
log_p = torch.logsumexp(-distance / (2 * {sigma}**2), dim=1)
(gradient,) = torch.autograd.grad(log_p.sum(), noisy)
assert torch.allclose(score(noisy), gradient), "not the gradient of log p"
assert torch.allclose(denoised(noisy), noisy + {sigma}**2 * gradient)
""",
        ),
    ]


COMPARED = (  # words, code of the mean over values of a sample
    ("the mean squared error", "(a - b).square().flatten(1).mean(dim=1)"),
    ("the mean absolute error", "(a - b).abs().flatten(1).mean(dim=1)"),
    ("the root of the mean squared error", "(a - b).square().flatten(1).mean(dim=1).sqrt()"),
)


def alignment(rng: Random) -> list[dict]:
    "Hidden alignment with weights a depth and norm control."
    blocks = rng.choice((3, 4, 5))
    weights = [number(rng, 0.2, 1.5, 1) for _ in range(blocks)]
    image = number(rng, 1.0, 4.0, 1)
    words, code = rng.choice(COMPARED)
    return [
        text(rf"""## Hidden alignment as one function

$F$ has {blocks} blocks, so its trajectory is $x^0 \dots x^{{{blocks}}}$ and $G$ gives the projected states
$\varphi_0(h^0) \dots \varphi_{{{blocks - 1}}}(h^{{{blocks - 1}}})$. Distances $\mathcal D$ are {words} of each sample. Before two states are compared,
**both** are divided by the root mean square of $x^i$, sample by sample. The image has weight {image} and is not divided;
depths $0, 1, \dots$ have weights {weights}. The loss is the mean over samples of the weighted sum."""),
        answer(
            "alignment",
            f"""def alignment_loss(states, projected, x, image):
    "A scalar. F's states, G's projected ones `(N, T, D)`; clean image, G's `(N, C, H, W)`."

    ### BEGIN SOLUTION
    def distance(a, b):
        return {code}

    loss = {image} * distance(x, image)
    for weight, a, b in zip({weights}, states, projected):
        size = a.square().flatten(1).mean(dim=1).sqrt()[:, None, None]
        loss = loss + weight * distance(a / size, b / size)
    return loss.mean()
    ### END SOLUTION""",
        ),
        tests(
            "test-alignment",
            4,
            f"""states = [(i + 1) * torch.randn(6, 4, 3) for i in range({blocks + 1})]
x = torch.randn(6, 1, 4, 3)
assert alignment_loss(states, states[:-1], x, x) < 1e-9, "what is equal costs nothing"
""",
            f"""guesses = [state + 0.3 * torch.randn_like(state) for state in states[:-1]]
guess, right = x + 0.2 * torch.randn_like(x), 0.0
for n in range(6):
    a, b = x[n][None], guess[n][None]
    right += {image} * {code}.item() / 6
    for weight, state, other in zip({weights}, states, guesses):
        a, b = (value[n][None] / state[n].square().mean().sqrt() for value in (state, other))
        right += weight * {code}.item() / 6
assert abs(alignment_loss(states, guesses, x, guess) - right) < 1e-4
""",
        ),
    ]


ESSAYS_3 = (
    (
        "G trained with squared error makes blurred images. Which part of the blur would stay in the best "
        "possible G, and which part is this G's own?",
        "The best answer is the mean of the clean images that fit: only what the noise σε hides is averaged. "
        "What a small or briefly trained G cannot resolve is averaged as well; that part shrinks with training.",
    ),
    (
        "Hidden distillation sends each state through token space; hidden alignment only looks at it there. "
        "What is lost in the first, and what may the second keep?",
        "D values per token are a bottleneck: what the width holds beyond x^i is thrown away at each depth. With "
        "alignment h^i goes on in full width; the head is for comparison alone.",
    ),
    (
        "Score denoising and a learned block lead to the same mean. Compare what each of them needs at "
        "sampling time and what each costs.",
        "The score needs a density that can be differentiated, σ and the label: a forward and a backward pass "
        "through all of F, about twice B blocks. The learned block needs training pairs beforehand and costs "
        "one block at sampling.",
    ),
)


# 4. guidance and evaluation (lessons 06, 13 and 14)


def frechet(rng: Random) -> list[dict]:
    "The Fréchet distance between sets of features."
    width = rng.choice((5, 6, 7))
    columns = sorted(rng.sample(range(width), rng.choice((3, 4))))
    ddof = rng.choice((0, 1))
    unit = number(rng, 1.2, 4.0)
    divisor = "n" if ddof == 0 else "n - 1"
    return [
        text(rf"""## A Fréchet distance

A judge gives {width} features for each image. This distance uses only the features {columns}, counted from 0, each divided by {unit}. With means $m$ and covariances $S$
(sums divided by ${divisor}$) of two sets,

$$\mathrm{{FD}} = \lVert m_1 - m_2\rVert^2 + \mathrm{{tr}}\big(S_1 + S_2 - 2\,(S_1 S_2)^{{1/2}}\big).$$"""),
        answer(
            "frechet",
            f"""def frechet(a, b):
    "The distance between features a `(n, {width})` and b `(m, {width})`, a float."
    ### BEGIN SOLUTION
    a, b = a[:, {columns}] / {unit}, b[:, {columns}] / {unit}
    s, t = (torch.cov(v.T, correction={ddof}) for v in (a, b))
    roots = torch.linalg.eigvals(s @ t).real.clamp(min=0).sqrt()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return (means + s.trace() + t.trace() - 2 * roots.sum()).item()
    ### END SOLUTION""",
        ),
        tests(
            "test-frechet",
            3,
            f"""a = torch.randn(30, {width}, dtype=torch.float64)
assert abs(frechet(a, a)) < 1e-6, "a set has distance 0 from itself"
""",
            f"""b = 0.5 + torch.randn(40, {width}, dtype=torch.float64) @ torch.randn({width}, {width}).double()
first, second = a[:, {columns}] / {unit}, b[:, {columns}] / {unit}
m, n = (v - v.mean(dim=0) for v in (first, second))
s, t = m.T @ m / (len(m) - {ddof}), n.T @ n / (len(n) - {ddof})
values, vectors = torch.linalg.eigh(s)
half = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
cross = torch.linalg.eigvalsh(half @ t @ half).clamp(min=0).sqrt().sum()
right = (first.mean(dim=0) - second.mean(dim=0)).square().sum() + s.trace() + t.trace() - 2 * cross
assert abs(frechet(a, b) - right.item()) < 1e-6
""",
        ),
    ]


def linear_guidance(g: float) -> tuple[str, str]:
    "Guidance of equal strength for all tokens: words and code."
    return (
        f"the same strength $g = {g}$ for every token, added to the outputs with a label:\n\n"
        r"$$\alpha = \alpha_c + g\,(\alpha_c - \alpha_u), \qquad \mu = \mu_c + g\,(\mu_c - \mu_u).$$",
        f"return alpha_c + {g} * (alpha_c - alpha_u), mu_c + {g} * (mu_c - mu_u)",
    )


def annealed_guidance(g: float) -> tuple[str, str]:
    "Guidance that grows along the tokens."
    return (
        f"a strength that grows along the tokens $t = 0 \\dots T-1$, with $g = {g}$ at the last:\n\n"
        r"$$g_t = g\,\frac{t}{T-1}, \qquad \alpha = \alpha_c + g_t\,(\alpha_c - \alpha_u), "
        r"\qquad \mu = \mu_c + g_t\,(\mu_c - \mu_u).$$",
        f"""steps = torch.arange(alpha_c.shape[1], dtype=alpha_c.dtype)
g = ({g} * steps / (len(steps) - 1))[:, None]
return alpha_c + g * (alpha_c - alpha_u), mu_c + g * (mu_c - mu_u)""",
    )


def variance_guidance(w: float) -> tuple[str, str]:
    "Guidance that minds the variance."
    return (
        f"the rule that minds the variance, with $w = {w}$ and $\\sigma = e^{{\\alpha}}$:\n\n"
        r"$$s = \min(\sigma_c/\sigma_u, 1)^2, \qquad \tilde\sigma = \frac{\sigma_c}{\sqrt{1 + w - w s}}, "
        r"\qquad \tilde\mu = \mu_c + \frac{w s}{1 + w - w s}\,(\mu_c - \mu_u).$$",
        f"""s = (2 * (alpha_c - alpha_u)).exp().clamp(max=1)
rest = 1 + {w} - {w} * s
return alpha_c - 0.5 * rest.log(), mu_c + {w} * s / rest * (mu_c - mu_u)""",
    )


def one_token(kind: str, strength: float, tokens: int) -> str:
    "Reference values of one number, worked out with plain floats."
    if kind == "variance":
        return f"""sigma_c, sigma_u = math.exp(ac), math.exp(au)
    s = min(sigma_c / sigma_u, 1) ** 2
    rest = 1 + {strength} - {strength} * s
    return math.log(sigma_c / math.sqrt(rest)), mc + {strength} * s / rest * (mc - mu)"""
    share = f"t / {tokens - 1}" if kind == "annealed" else "1"
    return f"""g = {strength} * {share}
    return (1 + g) * ac - g * au, (1 + g) * mc - g * mu"""


def indented(code: str, spaces: int = 4) -> str:
    "The same lines, further to the right."
    return "\n".join(" " * spaces + line for line in code.splitlines()).lstrip()


def guidance(rng: Random) -> list[dict]:
    "Guidance of the exact inverse in one of three forms."
    kinds = {
        "linear": linear_guidance,
        "annealed": annealed_guidance,
        "variance": variance_guidance,
    }
    kind, strength, tokens = (
        rng.choice(sorted(kinds)),
        number(rng, 0.3, 2.5, 3),
        rng.choice((4, 5, 6)),
    )
    words, code = kinds[kind](strength)
    return [
        text(f"""## Guidance of the exact inverse

A block gives $(\\alpha_c, \\mu_c)$ with the label and $(\\alpha_u, \\mu_u)$ without, each `(N, T, D)`. Combine them by {words}"""),
        answer(
            "guidance",
            f"""def guided(alpha_c, mu_c, alpha_u, mu_u):
    "The guided α and μ, each `(N, T, D)`."
    ### BEGIN SOLUTION
    {indented(code)}
    ### END SOLUTION""",
        ),
        tests(
            "test-guidance",
            3,
            f"""alpha_c, mu_c, alpha_u, mu_u = torch.randn(4, 2, {tokens}, 3, dtype=torch.float64)
same = guided(alpha_c, mu_c, alpha_c, mu_c)
assert torch.allclose(same[0], alpha_c), "nothing to guide away from"
assert torch.allclose(same[1], mu_c), "nothing to guide away from"
""",
            f"""

def one_value(ac, mc, au, mu, t):
    {one_token(kind, strength, tokens)}


alpha, mean = guided(alpha_c, mu_c, alpha_u, mu_u)
for n in range(2):
    for t in range({tokens}):
        values = [v[n, t, 1].item() for v in (alpha_c, mu_c, alpha_u, mu_u)]
        right = one_value(*values, t)
        assert abs(alpha[n, t, 1] - right[0]) < 1e-9, "α differs"
        assert abs(mean[n, t, 1] - right[1]) < 1e-9, "μ differs"
""",
        ),
    ]


def guided_training(rng: Random) -> list[dict]:
    "What is compared when guidance is trained into G."
    blocks = rng.choice((3, 4, 5))
    scales = [number(rng, 0.1, 2.0) for _ in range(blocks)]
    return [
        text(rf"""## Guidance in training

At inference guidance extrapolates: $h = (1 + w_i)\,a - w_i\,b$ with $a$ the state of block $i$ with the label and $b$ the state without.
In training, block $i$ of a guided $G$ gives states that are already guided, $a$ with the label and $b$ without, and the state to
compare with the flow's is recovered from them: $h = (a + w_i\,b) / (1 + w_i)$. Write both for $w = $ {scales}, one value for each block."""),
        answer(
            "training",
            f"""def extrapolated(i, a, b):
    "The guided state of block i at inference."
    ### BEGIN SOLUTION
    w = {scales}[i]
    return (1 + w) * a - w * b
    ### END SOLUTION


def recovered(i, a, b):
    "The state of block i that is compared in training."
    ### BEGIN SOLUTION
    w = {scales}[i]
    return (a + w * b) / (1 + w)
    ### END SOLUTION""",
        ),
        tests(
            "test-training",
            2,
            """a, b = torch.randn(2, 3, 4, 5, dtype=torch.float64)
there = extrapolated(0, a, b)
assert torch.allclose(recovered(0, there, b), a), "recovering does not invert extrapolating"
""",
            f"""for i, w in enumerate({scales}):
    assert torch.allclose(extrapolated(i, a, b), torch.lerp(b, a, 1 + w)), f"block {{i}}"
    assert torch.allclose(recovered(i, a, b), torch.lerp(b, a, 1 / (1 + w))), f"block {{i}}"
""",
        ),
    ]


def interval(rng: Random) -> list[dict]:
    "A difference from paired seeds with its interval."
    level = number(rng, 70, 99.5, 1)
    first, second = rng.choice((("a", "b"), ("b", "a")))
    return [
        text(f"""## When is a difference real?

Two methods were trained with the same seeds: `a[i]` and `b[i]` are their Fréchet distances with seed $i$. Give the mean of
`{first} - {second}` over seeds and the half-width of its {level} % confidence interval, by Student's $t$ for **paired** runs."""),
        answer(
            "interval",
            f"""def paired(a, b):
    "Mean of {first} − {second}, and half the width of its {level} % interval; two floats."
    ### BEGIN SOLUTION
    d = torch.as_tensor({first}, dtype=torch.float64) - torch.as_tensor({second}, dtype=torch.float64)
    t = scipy.stats.t.ppf(0.5 + {level} / 200, len(d) - 1)
    return d.mean().item(), t * d.std().item() / math.sqrt(len(d))
    ### END SOLUTION""",
        ),
        tests(
            "test-interval",
            3,
            """mean, half = paired([3.0, 4.0, 5.5], [2.0, 3.5, 4.0])
assert abs(abs(mean) - 1) < 1e-9 and half > 0
""",
            f"""a, b = torch.randn(2, 5, dtype=torch.float64).tolist()
d = [u - v for u, v in zip({first}, {second})]
low, high = scipy.stats.t.interval({level} / 100, 4, sum(d) / 5, scipy.stats.sem(d))
mean, half = paired(a, b)
assert abs(mean - sum(d) / 5) < 1e-9, "another mean"
assert abs(half - (high - low) / 2) < 1e-9, "another width"
""",
        ),
    ]


ESSAYS_4 = (
    (
        "A table reports FD 4.1 for one model from 10,000 samples and FD 5.0 for another from 2,000. What can "
        "be concluded, and what would you measure?",
        "Nothing yet: FD falls with n, by as much as that. Same n for both, the same reference images, the "
        "floor (real training images, same n), several seeds and an interval.",
    ),
    (
        "Label accuracy of samples rises with the guidance scale while the Fréchet distance first falls and then "
        "rises. Explain, and say how you would choose w without touching the test images.",
        "Guidance pulls samples to typical examples of the class: labels become clear and variety is lost, which "
        "the distance charges for. Choose on training (or validation) images, report once on test images.",
    ),
    (
        "G was trained with a distance between features of network A. Why may the Fréchet distance not use "
        "network A, and what may still go wrong with network B?",
        "G can satisfy A without making good images; the judge must not be the teacher. B may share A's data, "
        "architecture or blind spots, and sees only what its features hold.",
    ),
)


def essay_from(prompts) -> object:
    "A question graded by hand, one of several."

    def question(rng: Random) -> list[dict]:
        prompt, model = rng.choice(prompts)
        return [
            text(f"## In words\n\n{prompt} Answer in three to six sentences."),
            essay("words", 2, f"*For grading:* {model}"),
        ]

    return question


TOPICS = {  # name: title, what it covers, imports, questions in any order, the last one
    "change-of-variables": (
        "Change of variables and couplings",
        "lessons 01 and 02",
        MATH + HEAD,
        (map_of_the_line, coupling, bits),
        essay_from(ESSAYS_1),
    ),
    "autoregressive-flows": (
        "Autoregressive flows and TARFlow",
        "lessons 03, 07 and 08",
        HEAD,
        (masks, token_block, whole_flow),
        essay_from(ESSAYS_2),
    ),
    "learned-inverse": (
        "Learning the inverse",
        "lessons 10, 11 and 12",
        HEAD,
        (best_inverse, tweedie, alignment),
        essay_from(ESSAYS_3),
    ),
    "guidance-and-evaluation": (
        "Guidance and evaluation",
        "lessons 06, 13 and 14",
        MATH + "import scipy.stats\n" + HEAD,
        (frechet, guidance, guided_training, interval),
        essay_from(ESSAYS_4),
    ),
}
