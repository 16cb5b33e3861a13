"""Rules of ONNX operators by topic; importing this fills the table of specqd.frontends.onnx.rules."""

import importlib
import pkgutil

for _topic in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_topic.name}")
