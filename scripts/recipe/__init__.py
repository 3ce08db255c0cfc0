"""How the embedded models are made, stage by stage; scripts/toy.py runs it."""
