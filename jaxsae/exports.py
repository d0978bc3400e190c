"""What `jax.export` needs to write a function of ours to disk: what its pytrees are called there.

data = jax.export.export(jax.jit(jaxsae.refine))(sae, x).serialize()
refined, info = jax.export.deserialize(data).call(sae, x)
"""

import dataclasses
import importlib
import inspect
import json

from jax import export

for _name in ("activations", "certificate", "codes", "metrics", "normalisation", "refit", "sae", "solvers"):
    _module = importlib.import_module(f"jaxsae.{_name}")
    for _noun, _class in inspect.getmembers(_module, inspect.isclass):
        if _class.__module__ == _module.__name__ and dataclasses.is_dataclass(_class):
            export.register_pytree_node_serialization(
                _class,
                serialized_name=f"jaxsae.{_noun}",
                serialize_auxdata=lambda static: json.dumps(static).encode(),
                deserialize_auxdata=json.loads,
            )
