"""Launches one layer's kernels a few times, for ncu. ncu_one.py model format part w t s blocks"""
import sys
from token_program import *
name, form, part = sys.argv[1:4]
c = tuple(int(v) for v in sys.argv[4:])
m = Model(name, form, layers=2)
cfg = dict(START)
cfg[part] = c
m.lengths.fill_(300)
torch.cuda.synchronize()
for _ in range(2):
    m.run(cfg, only=(part,))
torch.cuda.synchronize()
