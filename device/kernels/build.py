#!/usr/bin/env python3
"""Builds kernels.ptx from kernels.cu with NVIDIA's run-time compiler, which needs no GPU.

    pip install nvidia-cuda-nvrtc-cu12==12.2.140 && python3 kernels/build.py

The text of that version runs on drivers from 535 on, on GPUs of compute capability 8.0 and above. The first line of
kernels.ptx names the source that it was built from: a test fails when kernels.cu is changed without building it.
"""
import ctypes
import hashlib
import pathlib
import site
import sys

HERE = pathlib.Path(__file__).resolve().parent
OPTIONS = [b"--gpu-architecture=compute_80", b"--std=c++14"]


def library():
    places = [pathlib.Path(p) for p in [*site.getsitepackages(), *sys.path]]
    for place in places:
        for found in sorted(place.glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(found))
    sys.exit("no libnvrtc: pip install nvidia-cuda-nvrtc-cu12==12.2.140")


def main():
    nvrtc = library()
    source = (HERE / "kernels.cu").read_bytes()
    program = ctypes.c_void_p()
    check = lambda code, what: code and sys.exit(f"{what} failed: {code}")
    check(nvrtcCreate(nvrtc, program, source), "nvrtcCreateProgram")
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    code = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)
    print(text(nvrtc, program, "Log").decode().strip("\0\n"), file=sys.stderr)
    check(code, "nvrtcCompileProgram")
    ptx = text(nvrtc, program, "PTX").rstrip(b"\0")
    digest = hashlib.sha256(source).hexdigest()
    (HERE / "kernels.ptx").write_bytes(f"// kernels.cu sha256 {digest}\n".encode() + ptx)


def nvrtcCreate(nvrtc, program, source):
    return nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None)


def text(nvrtc, program, kind):
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{'ProgramLog' if kind == 'Log' else kind}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{'ProgramLog' if kind == 'Log' else kind}")(program, buffer)
    return buffer.raw


if __name__ == "__main__":
    main()
