from __future__ import annotations
import pytest, torch
from compiled import RUNNABLE
from dense_cases import run_conv, run_gemm
from specqd.codegen.dense_kernels import ConvSpec, GemmSpec, Epilogue, Requantise
C=[ConvSpec(1,32,9,9,64,(3,3),(1,1),(1,1,1,1)),ConvSpec(2,40,9,11,40,(3,3),(2,2),(2,1,0,2),(1,1)),ConvSpec(1,96,7,7,24),ConvSpec(1,3,21,21,32,(7,7),(2,2),(3,3,3,3),planes=True),
 ConvSpec(1,48,7,7,48,(3,3),(1,1),(1,1,1,1),groups=48), ConvSpec(1,160,6,6,64)]
import dataclasses
@pytest.mark.parametrize("dtype",["uint8","int8","bfloat16","float32"])
@pytest.mark.parametrize("i",range(len(C)))
@pytest.mark.parametrize("isa",RUNNABLE)
def test_c(isa,i,dtype,rng):
    s=dataclasses.replace(C[i],dtype=dtype,out_dtype="int32" if "int" in dtype else "float32",zero=5 if "int" in dtype else 0)
    r=run_conv(s,isa,rng)
    if "int" in dtype: assert torch.equal(r.out,r.exact), (r.out-r.exact).abs().max()
    else: assert (r.out-r.exact).abs().max()<=1e-5*r.exact.abs().max()
@pytest.mark.parametrize("dtype",["uint8","int8","bfloat16"])
@pytest.mark.parametrize("isa",RUNNABLE)
def test_g(isa,dtype,rng):
    for s in (GemmSpec(None,40,96,dtype=dtype,out_dtype="int32" if "int" in dtype else "float32"),):
        for r in run_gemm(s,isa,rng,(1,5,17,33,150)):
            assert (r.out-r.exact).abs().max()<=(0 if "int" in dtype else 1e-5*r.exact.abs().max())
