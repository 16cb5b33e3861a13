"""From a graph to one TIR function: values, phases, layer loops."""
