"""Our declaration of XLA's foreign function interface is jaxlib's: sizes, offsets, numbers; and another version is refused."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

from sieve_attn import native

NATIVE = Path(__file__).parent.parent / "native"
STRUCTS = {
    "Extension": ("XLA_FFI_Extension_Base", {"struct_size": "struct_size", "type": "type", "next": "next"}),
    "Version": ("XLA_FFI_Api_Version", {"struct_size": "", "extension_start": "", "major_version": "", "minor_version": ""}),
    "ErrorCreateArgs": ("XLA_FFI_Error_Create_Args", {"struct_size": "", "extension_start": "", "message": "", "code": "errc"}),
    "Buffer": ("XLA_FFI_Buffer", dict.fromkeys(("struct_size", "extension_start", "dtype", "data", "rank", "dims"), "")),
    "Span": ("XLA_FFI_ByteSpan", {"ptr": "", "len": ""}),
    "Scalar": ("XLA_FFI_Scalar", {"dtype": "", "value": ""}),
    "Array": ("XLA_FFI_Array", {"dtype": "", "size": "", "data": ""}),
    "Args": ("XLA_FFI_Args", dict.fromkeys(("struct_size", "extension_start", "size", "types", "args"), "")),
    "Attrs": ("XLA_FFI_Attrs", dict.fromkeys(("struct_size", "extension_start", "size", "types", "names", "attrs"), "")),
    "CallFrame": ("XLA_FFI_CallFrame", dict.fromkeys(
        ("struct_size", "extension_start", "api", "stage", "args", "rets", "attrs", "future"), "") | {"context": "ctx"}),
    "Metadata": ("XLA_FFI_Metadata", dict.fromkeys(("struct_size", "api_version", "traits", "state_type_id"), "")),
    "MetadataExtension": ("XLA_FFI_Metadata_Extension", {"base": "extension_base", "metadata": ""}),
}  # fmt: skip
NUMBERS = {
    "PRED": "XLA_FFI_DataType_PRED", "S32": "XLA_FFI_DataType_S32", "S64": "XLA_FFI_DataType_S64", "U8_": "XLA_FFI_DataType_U8",
    "F16_": "XLA_FFI_DataType_F16", "F32_": "XLA_FFI_DataType_F32", "F64_": "XLA_FFI_DataType_F64",
    "BF16_": "XLA_FFI_DataType_BF16", "ATTR_ARRAY": "XLA_FFI_AttrType_ARRAY", "ATTR_SCALAR": "XLA_FFI_AttrType_SCALAR",
    "ATTR_DICTIONARY": "XLA_FFI_AttrType_DICTIONARY", "ATTR_STRING": "XLA_FFI_AttrType_STRING",
    "INVALID_ARGUMENT": "XLA_FFI_Error_Code_INVALID_ARGUMENT", "RESOURCE_EXHAUSTED": "XLA_FFI_Error_Code_RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION": "XLA_FFI_Error_Code_FAILED_PRECONDITION", "INTERNAL": "XLA_FFI_Error_Code_INTERNAL",
    "INSTANTIATE": "XLA_FFI_ExecutionStage_INSTANTIATE", "PREPARE": "XLA_FFI_ExecutionStage_PREPARE",
    "INITIALIZE": "XLA_FFI_ExecutionStage_INITIALIZE", "EXECUTE": "XLA_FFI_ExecutionStage_EXECUTE",
    "METADATA": "XLA_FFI_Extension_Metadata", "MAJOR": "XLA_FFI_API_MAJOR",
}  # fmt: skip


def comparison():
    """A C++ file that compiles if every structure and number is the same."""
    lines = ['#include "xla/ffi/api/c_api.h"', '#include "xla_abi.h"', "#include <cstddef>", "namespace x = sieve::xla;"]
    for mine, (theirs, fields) in STRUCTS.items():
        lines.append(f'static_assert(sizeof(x::{mine}) == sizeof({theirs}), "{mine}");')
        for field, other in fields.items():
            lines.append(
                f'static_assert(offsetof(x::{mine}, {field}) == offsetof({theirs}, {other or field}), "{mine}.{field}");'
            )
    for mine, theirs in (
        ("api_version", "api_version"),
        ("create_error", "XLA_FFI_Error_Create"),
        ("internal_api", "internal_api"),
    ):
        lines.append(f'static_assert(offsetof(x::Api, {mine}) == offsetof(XLA_FFI_Api, {theirs}), "Api.{mine}");')
    # results are laid out as arguments are
    lines.append(
        "static_assert(sizeof(x::Args) == sizeof(XLA_FFI_Rets) && offsetof(x::Args, args) == offsetof(XLA_FFI_Rets, rets));"
    )
    lines += [f'static_assert(int(x::{mine}) == int({theirs}), "{mine}");' for mine, theirs in NUMBERS.items()]
    lines.append('static_assert(x::MINOR <= XLA_FFI_API_MINOR, "this jaxlib is older than what handlers ask for");')
    return "\n".join(lines) + "\n"


def compiles(text, tmp_path):
    source = tmp_path / "compare.cpp"
    source.write_text(text)
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    command = [
        compiler,
        "-std=c++17",
        "-fsyntax-only",
        "-Wno-invalid-offsetof",
        f"-I{NATIVE}",
        f"-I{jax.ffi.include_dir()}",
        str(source),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_structures_and_numbers_are_those_of_jaxlib(tmp_path):
    text = comparison()
    named = set(re.findall(r"^struct (\w+) \{", (NATIVE / "xla_abi.h").read_text(), re.MULTILINE))
    assert named == {*STRUCTS, "Api"}, "a structure that nothing compares"
    done = compiles(text, tmp_path)
    assert done.returncode == 0, done.stderr
    moved = compiles(text.replace("offsetof(x::Buffer, rank)", "offsetof(x::Buffer, dims)"), tmp_path)
    assert moved.returncode != 0
    assert "Buffer.rank" in moved.stderr


class Version(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("start", ctypes.c_void_p), ("major", ctypes.c_int), ("minor", ctypes.c_int))


class ErrorArgs(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("start", ctypes.c_void_p), ("message", ctypes.c_char_p), ("code", ctypes.c_int32))


CREATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(ErrorArgs))


class Api(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("start", ctypes.c_void_p), ("version", Version), ("internal", ctypes.c_void_p),
                ("create", CREATE))  # fmt: skip


class Frame(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("start", ctypes.c_void_p), ("api", ctypes.POINTER(Api)), ("context", ctypes.c_void_p),
                ("stage", ctypes.c_int32), ("rest", ctypes.c_byte * 256))  # fmt: skip


@pytest.mark.parametrize(("major", "minor"), [(1, 0), (0, 2)])
def test_another_version_of_the_interface_is_refused_when_it_calls(major, minor):
    capsule = native.module().xla_handlers()["attend"]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Frame))(pointer(capsule, b"xla._CUSTOM_CALL_TARGET"))
    told = []

    @CREATE
    def create(args):
        told.append((args.contents.code, args.contents.message.decode()))
        return 1

    api = Api(ctypes.sizeof(Api), None, Version(24, None, major, minor), None, create)
    assert handler(ctypes.byref(Frame(ctypes.sizeof(Frame), None, ctypes.pointer(api), None, 3))) == 1
    code, message = told[0]
    assert code == 9
    assert f"written for XLA's foreign function interface 0.3 and this jaxlib has {major}.{minor}" in message
    assert "use backend='gather'" in message
