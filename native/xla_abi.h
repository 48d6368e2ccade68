// The part of XLA's foreign function interface that handlers need: its public, versioned C structures, declared here so that the
// extension builds without jaxlib. tests/jax/test_jax_abi.py holds every size and offset against jaxlib's own header.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sieve::xla {

constexpr int MAJOR = 0, MINOR = 3;  // the version that is declared here; later minor versions only add

enum DataType : int32_t {
  PRED = 1, S32 = 4, S64 = 5, U8_ = 6, F16_ = 10, F32_ = 11, F64_ = 12, BF16_ = 16,
};
enum AttrType : int32_t { ATTR_ARRAY = 1, ATTR_DICTIONARY = 2, ATTR_SCALAR = 3, ATTR_STRING = 4 };
enum ErrorCode : int32_t { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8, FAILED_PRECONDITION = 9, INTERNAL = 13 };
enum Stage : int32_t { INSTANTIATE = 0, PREPARE = 1, INITIALIZE = 2, EXECUTE = 3 };
enum ExtensionType : int32_t { METADATA = 1 };

struct Extension {
  size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct Version {
  size_t struct_size;
  Extension* extension_start;
  int major_version;
  int minor_version;
};

struct Error;  // XLA's own

struct ErrorCreateArgs {
  size_t struct_size;
  Extension* extension_start;
  const char* message;
  ErrorCode code;
};

// Its tail holds more functions, which handlers here do not call.
struct Api {
  size_t struct_size;
  Extension* extension_start;
  Version api_version;
  const void* internal_api;
  Error* (*create_error)(ErrorCreateArgs*);
};

struct Buffer {
  size_t struct_size;
  Extension* extension_start;
  DataType dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

struct Span {
  const char* ptr;
  size_t len;
};

struct Scalar {
  DataType dtype;
  void* value;
};

struct Array {
  DataType dtype;
  size_t size;
  void* data;
};

struct Args {  // of arguments and of results, which are laid out alike
  size_t struct_size;
  Extension* extension_start;
  int64_t size;
  int32_t* types;
  void** args;
};

struct Attrs {
  size_t struct_size;
  Extension* extension_start;
  int64_t size;
  AttrType* types;
  Span** names;
  void** attrs;
};

struct CallFrame {
  size_t struct_size;
  Extension* extension_start;
  const Api* api;
  void* context;
  Stage stage;
  Args args;
  Args rets;
  Attrs attrs;
  void* future;
};

struct Metadata {
  size_t struct_size;
  Version api_version;
  uint32_t traits;
  int64_t state_type_id;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

using Handler = Error*(CallFrame*);

}  // namespace sieve::xla
