"""From a module's graph to machine code: TIR kernels in a Relax function, whatever the module computes."""
