"""Install bitflow_edu: metadata comes from settings.ini, the embedded data from data/."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
groups = ("notebooks", "perceptual", "scale", "export", "dev", "docs")
extras = {name: cfg[f"{name}_requirements"].split() for name in groups}
# data/ and the numbers of results/ travel inside the package, where bitflow_edu.io.files.asset
# finds them: lessons run wherever the package is installed
travelling = {"bitflow_edu.assets": "data", "bitflow_edu.assets.results": "results"}
assets = "*.npz */*.json */*.safetensors */*/*.json */*/*.safetensors */*/*.jsonl */README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={**extras, "all": sum(extras.values(), [])},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    packages=[*find_packages(include=["bitflow_edu", "bitflow_edu.*"]), *travelling],
    package_dir=travelling,
    package_data={
        "bitflow_edu.assets": ["README.md", *assets.split()],
        "bitflow_edu.assets.results": ["*.json"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
