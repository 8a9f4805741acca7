"""HyperLoRA's hypernetwork in PyTorch, written from the paper's facts: the reference that the Rust one is held to.

Parameters go by the names of the released files, so that a state dict of a part is that part's file.
"""

import torch
from torch import nn
from torch.nn.functional import layer_norm, linear


class Attention(nn.Module):
    """Multi-head attention without biases, scores written out."""

    def __init__(self, dim, heads, head_dim):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        inner = heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim, bias=False)])

    def forward(self, queries, context):
        def heads(x):
            return x.view(x.shape[0], x.shape[1], self.heads, self.head_dim).permute(0, 2, 1, 3)

        q, k, v = heads(self.to_q(queries)), heads(self.to_k(context)), heads(self.to_v(context))
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / self.head_dim**0.5
        mixed = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        return self.to_out[0](mixed.permute(0, 2, 1, 3).flatten(2))


class FeedForward(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, dim, mult):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(dim, dim * mult)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(dim * mult, dim)])

    def forward(self, x):
        return self.net[2](nn.functional.gelu(self.net[0].proj(x), approximate="none"))


class Layer(nn.Module):
    """One resampler layer, for one or two conditions."""

    def __init__(self, dim, heads, head_dim, ff_mult, two_conditions):
        super().__init__()
        self.norm_attn1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, head_dim)
        self.norm_attn2_l, self.norm_attn2_x = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, head_dim)
        if two_conditions:
            self.norm_attn3_l, self.norm_attn3_y = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.attn3 = Attention(dim, heads, head_dim)
        self.norm_ff = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, ff_mult)

    def forward(self, latents, x=None, y=None):
        own = self.norm_attn1(latents)
        latents = latents + self.attn1(own, own)
        if x is not None:
            latents = latents + self.attn2(self.norm_attn2_l(latents), self.norm_attn2_x(x))
        if y is not None:
            latents = latents + self.attn3(self.norm_attn3_l(latents), self.norm_attn3_y(y))
        return latents + self.ff(self.norm_ff(latents))


class Resampler(nn.Module):
    """Learned latents that attend to the conditions x and y; a condition of None is off."""

    def __init__(self, queries, width, output, dim, depth, heads, head_dim, ff_mult, two_conditions):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, queries, dim) / dim**0.5)
        self.proj_in = nn.Linear(width, dim)
        if two_conditions:
            self.proj_in_2 = nn.Linear(width, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, head_dim, ff_mult, two_conditions) for _ in range(depth))
        self.proj_out = nn.Linear(dim, output)

    def forward(self, x=None, y=None):
        batch = (x if x is not None else y).shape[0]
        x = None if x is None else self.proj_in(x)
        y = None if y is None else self.proj_in_2(y)
        latents = self.latents.expand(batch, -1, -1)
        for layer in self.layers:
            latents = layer(latents, x, y)
        return self.proj_out(latents)


class HyperLora(nn.Module):
    """Conditions to the down and up matrices of every attention's linears.

    `sites` is `{LoRA prefix: {"hidden_size": int, "cross_attention_dim": int or None}}` in module order; `sizes` has the
    fields of the Rust `HyperLoraConfig`; a `base_rank` of 0 leaves the Base-LoRA out. `alpha = rank / 2`, so the scale
    0.5 is folded into `up`.
    """

    LINEARS = ("to_q", "to_k", "to_v", "to_out")
    SCALE = 0.5

    def __init__(self, sites, sizes):
        super().__init__()
        self.sites, self.sizes = sites, sizes
        shared = dict(queries=8 * len(sites), width=sizes["clip_dim"], output=sizes["basis"], **sizes["resampler"])
        self.resampler = Resampler(two_conditions=True, **shared)
        self.base_resampler = Resampler(two_conditions=False, **shared) if sizes["base_rank"] else None
        self.id_projector = nn.ModuleList(
            [nn.Linear(sizes["id_embedding_dim"], sizes["id_tokens"] * sizes["clip_dim"]), nn.Identity(),
             nn.LayerNorm(sizes["clip_dim"])]
        )
        self.bases = {}  # by the key in hyper_lora_modules.safetensors
        for i, site in enumerate(sites.values()):
            hidden, context = site["hidden_size"], site["cross_attention_dim"] or site["hidden_size"]
            for name, width in zip(self.LINEARS, (hidden, context, context, hidden)):
                for part, rank in (("id", sizes["id_rank"]), ("base", sizes["base_rank"])):
                    if not rank:
                        continue
                    down, up = (sizes["basis"], width, rank), (sizes["basis"], rank, hidden)
                    self.bases[f"{i}.{name}.{part}_down_basis"] = nn.Parameter(torch.randn(down) / width**0.5)
                    self.bases[f"{i}.{name}.{part}_up_basis"] = nn.Parameter(torch.randn(up) / rank**0.5)

    def project(self, id_embedding):
        """[B, E] to [B, tokens, width]."""
        first, _, norm = self.id_projector
        tokens = linear(id_embedding, first.weight, first.bias).view(len(id_embedding), self.sizes["id_tokens"], -1)
        return layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias, norm.eps)

    @staticmethod
    def coefficients(tokens, images):
        """Mean over each sample's images, then length 1 over K."""
        mean = tokens.view(-1, images, *tokens.shape[1:]).mean(1)
        return mean * torch.rsqrt(mean.pow(2).sum(-1, keepdim=True) + 1e-8)

    def id_coefficients(self, clip_states, id_embedding=None, images=1):
        x = None if id_embedding is None else self.project(id_embedding)
        return self.coefficients(self.resampler(x, clip_states), images)

    def base_coefficients(self, clip_states, images=1):
        return self.coefficients(self.base_resampler(clip_states), images)

    def lora(self, part, coefficients):
        """[(down [B, in, r], up [B, r, out])] for q, k, v, out of each module."""
        pairs = []
        for i in range(len(self.sites)):
            for j, name in enumerate(self.LINEARS):
                down, up = (
                    torch.einsum("bk,kmn->bmn", coefficients[:, 8 * i + 2 * j + side],
                                 self.bases[f"{i}.{name}.{part}_{kind}_basis"])
                    for side, kind in enumerate(("down", "up"))
                )
                pairs.append((down, up * self.SCALE))
        return pairs

    def files(self):
        """The tensors of the released folder, by file stem and key."""
        bases = {"hyper_lora_modules": {key: basis.detach() for key, basis in self.bases.items()}}
        return bases | {stem: getattr(self, stem).state_dict() for stem in self.stems()}

    def stems(self):
        """The parts beside the bases."""
        return [stem for stem in ("resampler", "base_resampler", "id_projector") if getattr(self, stem) is not None]

    def named_by_file(self):
        """Every parameter as ("{file stem}.{key}", parameter)."""
        yield from ((f"hyper_lora_modules.{key}", basis) for key, basis in self.bases.items())
        for stem in self.stems():
            yield from ((f"{stem}.{key}", value) for key, value in getattr(self, stem).named_parameters())
