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
    ("Laser", 0.1396, 0.0970, 0.0893, LASER_PAPER, "run here as `laser`, on a smaller model"),
    ("KAR", 0.1265, 0.0894, 0.0813, LASER_PAPER, "needs texts that a large model writes about every user and item"),
    ("LLM4REC", 0.1257, 0.0764, 0.0683, LASER_PAPER, "trains all 787 M weights of GPT-2 Large; `full` is the nearest"),
    (
        "RecGURU",
        0.0781,
        0.0575,
        0.0566,
        LASER_PAPER,
        "learns its users from a second domain, and there is one here",
    ),
    ("LlamaRec", 0.1275, 0.0857, 0.0793, LASER_PAPER, "reranks by a 7 B model with QLoRA; `lora` is the nearest"),
    ("RecFormer", 0.1448, 0.1027, 0.0951, RECFORMER_PAPER, "needs its Longformer, pre-trained on seven categories"),
    (
        "RecFormer without pre-training",
        0.1114,
        0.0722,
        0.0650,
        LASER_PAPER,
        "the variant that the Laser paper prints; not implemented here",
    ),
]
