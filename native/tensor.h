// Arrays as views. Included by bind.cpp alone, which knows Python.
#pragma once
#include <nanobind/nanobind.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "view.h"

namespace sieve {

const std::pair<const char*, DType> DTYPES[] = {{"float32", F32}, {"float16", F16}, {"bfloat16", BF16}, {"bool", U8},
                                                {"uint8", U8},    {"int32", I32},   {"int64", I64}};

template <class T, size_t N>
T named(const char* what, const std::pair<const char*, T> (&table)[N], const std::string& name) {
  for (const auto& [n, value] : table)
    if (name == n) return value;
  throw std::invalid_argument(std::string("`") + what + "` must be one that kernels know; got '" + name + "'; convert it first");
}

// Up to four axes; missing ones come first, with size 1.
inline View make_view(uintptr_t pointer, const std::string& dtype, const std::vector<int64_t>& shape, const std::vector<int64_t>& stride) {
  if (shape.size() > 4 || stride.size() != shape.size()) throw std::invalid_argument("`shape` must have at most 4 axes, each with its stride");
  View v{reinterpret_cast<void*>(pointer), named("dtype", DTYPES, dtype), {1, 1, 1, 1}, {0, 0, 0, 0}};
  std::copy_backward(shape.begin(), shape.end(), v.shape + 4);
  std::copy_backward(stride.begin(), stride.end(), v.stride + 4);
  return v;
}

// What Python's C interface returned, or the error that it set
inline nanobind::object held(PyObject* x) {
  if (!x) throw nanobind::python_error();
  return nanobind::steal(x);
}

// The dtype of a PyTorch tensor. PyTorch has one object for each, forever; those met are known from then on.
inline DType dtype_of(nanobind::handle dtype) {
  static std::vector<std::pair<PyObject*, DType>> known;
  for (const auto& [object, value] : known)
    if (object == dtype.ptr()) return value;
  const std::string name = nanobind::cast<std::string>(nanobind::str(dtype));
  const DType value = named("dtype", DTYPES, name.substr(name.rfind('.') + 1));
  known.emplace_back(dtype.inc_ref().ptr(), value);
  return value;
}

// A PyTorch tensor, asked for its attributes here: two thirds of the time that Python takes for it.
inline View tensor_view(nanobind::handle tensor) {
  static PyObject *const data_ptr = PyUnicode_InternFromString("data_ptr"), *const dtype = PyUnicode_InternFromString("dtype");
  static PyObject *const shape = PyUnicode_InternFromString("shape"), *const stride = PyUnicode_InternFromString("stride");
  const nanobind::object sizes = held(PyObject_GetAttr(tensor.ptr(), shape));
  const nanobind::object steps = held(PyObject_CallMethodNoArgs(tensor.ptr(), stride));
  const nanobind::object start = held(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
  if (!PyTuple_Check(sizes.ptr()) || !PyTuple_Check(steps.ptr())) throw std::invalid_argument("`tensor` must be a tensor of PyTorch");
  const int64_t axes = PyTuple_GET_SIZE(sizes.ptr());
  if (axes > 4 || PyTuple_GET_SIZE(steps.ptr()) != axes) throw std::invalid_argument("`tensor` must have at most 4 axes");
  View v{PyLong_AsVoidPtr(start.ptr()), dtype_of(held(PyObject_GetAttr(tensor.ptr(), dtype))), {1, 1, 1, 1}, {0, 0, 0, 0}};
  for (int64_t i = 0; i < axes; ++i) {
    v.shape[4 - axes + i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i));
    v.stride[4 - axes + i] = PyLong_AsLongLong(PyTuple_GET_ITEM(steps.ptr(), i));
  }
  if (PyErr_Occurred()) throw nanobind::python_error();
  return v;
}

}  // namespace sieve
