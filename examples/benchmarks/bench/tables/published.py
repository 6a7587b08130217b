"""Rivals that are not run here: what others published of them, on another split than ours."""

SPLIT = (
    "RecFormer's split of Amazon Scientific (11,041 users, 5,327 items, 76,896 events), not the one above: compare "
    "these rows with each other only, and by how far a method is from SASRec"
)
LASER_PAPER = "Laser paper, main results table"
RECFORMER_PAPER = "RecFormer paper, as its authors report it"

#: name, Recall@10, NDCG@10, MRR, source, why it is not run here
PUBLISHED: list[tuple[str, float, float, float, str, str]] = [
    ("SASRec", 0.1305, 0.0797, 0.0696, LASER_PAPER, "run here as `sasrec`; the anchor of this table"),
    ("BERT4Rec", 0.1061, 0.0790, 0.0759, LASER_PAPER, "run here as `bert4rec`"),
    ("FDSA", 0.0967, 0.0716, 0.0692, LASER_PAPER, "run here as `fdsa`, in its style"),
    ("ZESRec", 0.1260, 0.0843, 0.0745, LASER_PAPER, "run here as `zesrec`, in its style"),
    ("LlamaRec", 0.1275, 0.0857, 0.0793, LASER_PAPER, "run here as `llamarec`, in its style, on a smaller model"),
    ("Laser", 0.1396, 0.0970, 0.0893, LASER_PAPER, "run here as `laser`, on a smaller model"),
    (
        "KAR",
        0.1265,
        0.0894,
        0.0813,
        LASER_PAPER,
        "needs what ChatGPT writes about every user and item, which cannot be had offline or rerun",
    ),
    (
        "LLM4REC",
        0.1257,
        0.0764,
        0.0683,
        LASER_PAPER,
        "puts the graph's edges into the attention of GPT-2 Large and trains all of it; `full` is the nearest",
    ),
    (
        "RecGURU",
        0.0781,
        0.0575,
        0.0566,
        LASER_PAPER,
        "learns its users adversarially from two domains at once, and there is one here",
    ),
    (
        "RecFormer",
        0.1448,
        0.1027,
        0.0951,
        RECFORMER_PAPER,
        "starts from its own Longformer, pre-trained on seven categories of purchases",
    ),
    (
        "RecFormer without pre-training",
        0.1114,
        0.0722,
        0.0650,
        LASER_PAPER,
        "the variant that the Laser paper prints; it too tunes a Longformer",
    ),
]
