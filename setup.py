"""Packaging. cuda/ and models/ stand at the top of the checkout, and inside the package when installed."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "ffmini/__init__.py").read_text()).group(1)

CHAT = ["jinja2>=3.1.5"]
CUDA12 = ["cupy-cuda12x>=13.6", "nvidia-cuda-nvrtc-cu12"]
CUDA13 = ["cupy-cuda13x>=13.6", "nvidia-cuda-nvrtc>=13,<14"]
# setuptools 70.1 is the first that builds a wheel by itself: a test does, without network.
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "ruff>=0.15,<0.18",
    "clang-format>=20,<24",
    "setuptools>=70.1",
    *CHAT,
]

setup(
    name="ffmini",
    version=VERSION,
    description="One language model, one person, as fast as the GPU's memory allows; without PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["ffmini", "ffmini.cuda", "ffmini.models"],
    package_dir={"ffmini.cuda": "cuda", "ffmini.models": "models"},
    package_data={"ffmini": ["py.typed"], "ffmini.cuda": ["*"], "ffmini.models": ["*/*"]},
    install_requires=["numpy>=1.26", "safetensors>=0.4", "tokenizers>=0.20", "tqdm>=4.60"],
    extras_require={
        "chat": CHAT,
        "cuda12": CUDA12,
        "cuda13": CUDA13,
        "test": TEST,
        "dev": [*TEST, "torch==2.13.0", "transformers>=5"],
    },
    entry_points={"console_scripts": ["ffmini = ffmini.cli:main"]},
)
