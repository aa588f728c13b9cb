import re, sys
from dataclasses import dataclass
@dataclass(frozen=True)
class Targets:
    modules: list; parameters: list; source: str
def matches(key, spec):
    if spec is None: return False
    if isinstance(spec,str): return re.fullmatch(spec,key) is not None
    return any(key==s or key.endswith("."+s) for s in spec)
def model_type(m): return getattr(getattr(m,"config",None),"model_type",None)
def default_feedforward(mt): return ["down_proj"]
def pattern_value(p,k,d):
    for a,v in p.items():
        if re.match(rf"(.*\.)?({a})$",k): return v
    return d
def suggest(v,c): return ""
def resolve(model, config, *, supported, skip=frozenset()):
    t=config.target_modules
    if t is None: t=["q_proj","v_proj"]
    if t=="all-linear": mods=[n for n,m in model.named_modules() if type(m).__name__=="Linear" and n!="lm_head"]
    else: mods=[n for n,m in model.named_modules() if matches(n,t)]
    return Targets(mods,[n for n,_ in model.named_parameters() if matches(n, getattr(config,"target_parameters",None) or [])],"")
