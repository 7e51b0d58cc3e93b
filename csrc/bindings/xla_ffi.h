// Declares the parts of XLA's foreign function interface that this project uses. XLA keeps these layouts stable and
// marks additions by the minor version. So building needs no header of XLA, and one binary works with all versions of
// jaxlib since 0.6.
#pragma once
#include <cstddef>
#include <cstdint>

namespace selfattn::xla {

// XLA refuses to start its CPU backend with a handler whose minor version is newer than its own. So this is the oldest
// version that has everything used here.
constexpr int api_major = 0;
constexpr int api_minor = 1;

// Extensions form a list. Every struct begins with its size in bytes and the list of its extensions.
struct Extension {
  std::size_t size;
  int kind;
  Extension* next;
};

struct Version {
  std::size_t size;
  Extension* extensions;
  int major_number;
  int minor_number;
};

// A call frame with this extension asks for the handler's version. The handler must then compute nothing.
constexpr int metadata_kind = 1;

struct Metadata {
  std::size_t size;
  Version version;
  std::uint32_t traits;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

enum class Type : int { boolean = 1, i32 = 4, i64 = 5, u32 = 8, f16 = 10, f32 = 11, f64 = 12, bf16 = 16 };

// A dense array in row-major order.
struct Buffer {
  std::size_t size;
  Extension* extensions;
  Type type;
  void* data;
  std::int64_t rank;
  std::int64_t* extents;
};

struct Buffers {
  std::size_t size;
  Extension* extensions;
  std::int64_t count;
  int* kinds;  // all are arrays
  Buffer** buffers;
};

struct Name {
  const char* text;
  std::size_t length;
};

struct Scalar {
  Type type;
  void* value;
};

struct Attributes {
  std::size_t size;
  Extension* extensions;
  std::int64_t count;
  int* kinds;
  Name** names;
  void** values;
};
constexpr int scalar_kind = 3;

struct Error;
enum class ErrorCode : int { invalid_argument = 3, resource_exhausted = 8, internal = 13 };

struct ErrorRequest {
  std::size_t size;
  Extension* extensions;
  const char* message;  // XLA copies it
  ErrorCode code;
};

struct Api {
  std::size_t size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*create_error)(ErrorRequest*);
  // More functions follow.
};

struct CallFrame {
  std::size_t size;
  Extension* extensions;
  const Api* api;
  void* context;
  int stage;
  Buffers arguments;
  Buffers results;
  Attributes attributes;
};

}  // namespace selfattn::xla
