"""Packaging of peft_bituning."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

SENTENCE_TRANSFORMERS = "sentence-transformers>=6.2,<6.3"
FAISS = "faiss-cpu>=1.15.1,<1.16"
QUICKSTART = ["gguf", "matplotlib"]
PYDANTIC = "pydantic>=2,<3"
TEST = [
    *QUICKSTART,
    PYDANTIC,
    SENTENCE_TRANSFORMERS,
    FAISS,
    "bitsandbytes>=0.50,<0.51",
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "ranx",
    "ruff",
    "mypy",
    "pandas",
]

setup(
    name="peft_bituning",
    version="0.1.0",
    description="Laser and Bi-Tuning: recommending with a frozen language model, as a Hugging Face PEFT method",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["peft_bituning", "peft_bituning.*"]),
    package_data={"peft_bituning": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "peft>=0.21,<0.22",
        "torch>=2.6,<2.14",
        "transformers>=5,<5.24",
        "accelerate>=1.10,<1.16",
        "datasets>=4,<5.3",
        "safetensors>=0.5,<0.9",
        "evaluate>=0.4.5,<0.5",
        "huggingface_hub>=1,<2.5",
        "numpy>=2,<2.5",
        "scipy>=1.13,<2",
        "scikit-learn>=1.6,<2",
    ],
    extras_require={
        "test": TEST,
        "quickstart": QUICKSTART,
        "sentence-transformers": [SENTENCE_TRANSFORMERS],
        "faiss": [FAISS],
        "bench": [PYDANTIC, "matplotlib"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
