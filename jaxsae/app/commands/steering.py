"""The command that edits what a language model computes: steer."""

from typing import Any

from jaxsae._core import arguments
from jaxsae._core.files import InputError
from jaxsae.app import console
from jaxsae.app.commands.autoencoders import _load


def steer(
    *,
    sae: arguments.Autoencoder,
    model: arguments.Model,
    latent: arguments.Index,
    scale: arguments.Number,
    prompt: arguments.Prompt,
    layer: arguments.Index | None = None,
    site: arguments.Site | None = None,
    tokens: arguments.Count = 64,
    temperature: arguments.Weight = 0.0,
    seed: arguments.Seed = 0,
    json: bool = False,
) -> int:
    """Continue a text with a latent made more active.

    The model's own continuation stands beside it.

    At every position but the first, scale times the latent's atom is added to the activations of the autoencoder's
    site; what it does not reconstruct stays as it is. A row-normalising autoencoder's atom is in the units of the row.

    Example: jaxsae steer --sae run --model smollm2 --layer 8 --latent 12 --scale 8 --prompt The

    Args:
        sae: a training run or one of its saves (RUN/checkpoints/N), or an SAE of any format, on disk, in a bucket
            or on the hub (hf://organisation/repository/path).
        model: smollm2, a GGUF file or a Hugging Face directory; the one that the SAE says it is of.
        latent: its number, from 0.
        scale: what is added to the latent's activation, in its own units; may be negative. Some multiple of its maximum
            over a text is usual: SAELens' steering_strength times max_act.
        prompt: text to continue.
        layer: block of the model, from 0; by default the one that the SAE says it is of.
        site: likewise, resid_post if it says nothing; or a hook that names its layer, such as blocks.8.hook_mlp_out.
        tokens: number of tokens to append; a text that the model ends is shorter.
        temperature: of sampling; 0 takes the most probable token. Both continuations have the same random numbers.
        seed: of sampling.
        json: print both continuations, and the norms of what is added and of the activations, as one JSON object.
    """
    from jaxsae.language_model import files

    autoencoder, place = _placed(sae, model, layer, site)
    config = files.read_config(model)
    _require_fit(autoencoder, place, config, latent)
    tokenizer = files.read_tokenizer(model)
    ids, stop = tokenizer.encode(prompt).ids, files.stops(model, tokenizer)
    if not ids or not 3 <= len(ids) + tokens <= config.context:
        got = f"got a prompt of {len(ids)} tokens and --tokens {tokens}"
        raise InputError(f"{got}; pass a prompt of at least 1, and 3 to {config.context} in all, the model's context.")
    how = {"temperature": temperature, "seed": seed, "stop": stop}
    found = _continued(model, autoencoder, place, ids, tokens, latent, scale, **how)
    texts = {name: _text(tokenizer, row, stop) for name, row in found.pop("ids").items()}
    named = {"model": model, "layer": place.layer, "site": place.site, "latent": latent, "scale": scale}
    title = f"latent {latent} + {scale:g} at layer {place.layer}, {place.site}"
    shown = console.side_by_side({name: prompt + text for name, text in texts.items()}, title)
    added = f"Added: a vector of norm {found['added']:.4g}; the activations' median norm is {found['median_norm']:.4g}"
    console.show(named | {"prompt": prompt} | texts | found, f"{shown}\n{added}", as_json=json)
    return 0


def _placed(path: str, model: str, layer: int | None, site: str | None) -> tuple[Any, Any]:
    """An SAE, and the place of the model that its atoms are added to, by its files and by the options."""
    from jaxsae.data.origin import Origin, require_same
    from jaxsae.language_model import sites

    named, site = (None, None) if site is None else sites.parse(site)
    if None not in (layer, named) and layer != named:
        raise InputError(f"got --layer {layer} and a --site of layer {named}; pass one of them.")
    layer = named if layer is None else layer
    sae, known = _load(path)
    require_same(known, Origin(model, layer, site), "options")
    layer = known.layer if layer is None else layer
    if layer is None:
        raise InputError(f"{path}: does not say which layer it is of; pass --layer.")
    return sae, sites.Site(layer, site or known.site or "resid_post")


def _require_fit(sae, place, config, latent: int) -> None:
    from jaxsae.autoencoder.normalisation import AverageNorm
    from jaxsae.language_model import sites

    sites.require(config, *place)
    if sae.transcoder:
        raise InputError("the SAE is a transcoder, whose atoms belong to another site; pass an autoencoder.")
    if isinstance(sae.normalisation, AverageNorm):
        what = "the SAE expects rows scaled to a mean norm, which the model's are not"
        raise InputError(f"{what}; fold the scale into it with jaxsae.autoencoder.fold_scale.")
    width = sites.width(config, place.site)
    if sae.d != width:
        what = f"the SAE is {sae.d} wide, the model's {place.site} {width}"
        raise InputError(f"{what}; pass the model and the site that it is of.")
    if latent >= sae.m:
        raise InputError(f"got --latent {latent}, the SAE has {sae.m}; pass one from 0 to {sae.m - 1}.")


def _continued(model: str, sae, place, ids, tokens: int, latent: int, scale: float, *, seed: int, **how: Any):
    """Continuations, clean and steered, and how long what is added is beside the activations."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.tree_util import Partial

    from jaxsae import autoencoder, language_model

    net, prompt = language_model.load(model), jnp.array([ids])
    how |= {"key": jax.random.key(seed), "layer": place.layer, "site": place.site}
    found = {}
    for name, amount in {"clean": 0.0, "steered": scale}.items():  # which are one program
        fn = Partial(autoencoder.steer, sae, latent=jnp.array(latent), scale=jnp.array(amount, jnp.float32))
        found[name] = np.asarray(language_model.generate(net, prompt, tokens, fn=fn, **how))[0]
    if (found["clean"] < 0).any():
        raise InputError(f"the logits are NaN even with --scale 0, by latent {latent} or the model; pass others.")
    whole = jnp.concatenate([prompt[0], found["clean"]])[None]
    h = jax.jit(language_model.residual, static_argnums=(2, 3))(net, whole, place.layer, place.site)[0, 1:]
    added = autoencoder.steer(sae, jnp.float32(h), latent, scale) - jnp.float32(h)
    norms = [float(np.median(np.linalg.norm(np.asarray(x, np.float64), axis=-1))) for x in (added, h)]
    if (found["steered"] < 0).any() or not norms[0] < 2.0**63:  # whose square is no float32
        raise InputError(f"got --scale {scale:g}, at which activations overflow; pass one nearer to 0.")
    return {"ids": found, "added": norms[0], "median_norm": norms[1]}


def _text(tokenizer, ids, stops: list[int]) -> str:
    """The text of tokens, up to the first that ends it."""
    ends = [number for number, token in enumerate(ids) if token in stops]
    return tokenizer.decode([int(token) for token in ids[: min(ends, default=len(ids))]], skip_special_tokens=False)
