"""How the embedded models are made, stage by stage; scripts/toy/train.py runs it."""
