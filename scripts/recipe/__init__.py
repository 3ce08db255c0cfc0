"""How the embedded model is made, stage by stage; scripts/toy.py runs it."""
