"""Pictures, autoencoders and latents of a smoke run, for the tests of latents."""

from bitflow_edu.scale.autoencoder import tiny_decoder, tiny_vae
from bitflow_edu.scale.image_sources import FolderSource, synthetic_images
from bitflow_edu.scale.latents import CacheConfig, cache_latents

CFG = CacheConfig(image_size=16, batch_size=4, max_corrupt=2, workers=2)


def make_toys(folder):
    """A folder of pictures and two autoencoders, as their files lie on disk."""
    synthetic_images(folder / "pictures", 30)
    tiny_vae(folder / "vae")
    tiny_decoder(folder / "small")
    return folder


def pictures_of(toys):
    """The toy pictures as a source, eight images a shard."""
    return FolderSource(str(toys / "pictures"), per_shard=8)


def make_cache(toys, vae, out):
    """The finished latents of the toy pictures; tests that change files work on a copy."""
    cache_latents(pictures_of(toys), out, vae, CFG)
    return out


def shard(out, k):
    return out / "shards" / f"{k:05d}.safetensors"


def contents(out):
    """Every file of a cache, as bytes."""
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


def mse(a, b):
    return (a - b).square().mean(dim=(1, 2, 3))
