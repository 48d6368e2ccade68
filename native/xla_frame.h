// One call of XLA, read by name: arrays as Views, attributes as numbers. Attributes `inputs` and `outputs` name the arrays.
#pragma once
#include <string>
#include <vector>

#include "view.h"
#include "xla_abi.h"

namespace sieve {

class Frame {
 public:
  explicit Frame(const xla::CallFrame& call);

  // Axes that vmap put in front are walked by `item`, 0 .. items() - 1; every array has as many of them, of length 1 where it
  // is shared. A View has axes of its own rank, `rank` of them, last ones last; data is null where the array was left out.
  int64_t items() const { return items_; }
  View input(const char* name, int rank, int64_t item) const { return view(inputs_, name, rank, item); }
  View output(const char* name, int rank, int64_t item) const { return view(outputs_, name, rank, item); }
  bool has(const char* input) const { return find(inputs_, input) != nullptr; }

  int64_t integer(const char* name) const;
  double number(const char* name) const;
  bool knows(const char* attribute) const { return attribute_of(attribute) >= 0; }
  std::vector<int64_t> list(const char* name) const;  // empty where it is not there

  // Bit planes [bits, ...]: planes are the leading axis of the array itself.
  View planes(const char* name, bool is_input, int64_t item, int64_t* plane_stride) const;

 private:
  struct Named {
    std::string name;
    const xla::Buffer* buffer;
  };
  static const Named* find(const std::vector<Named>& from, const char* name);
  View view(const std::vector<Named>& from, const char* name, int rank, int64_t item) const;
  int64_t first_element(const xla::Buffer& b, int rank, int64_t item) const;
  int64_t attribute_of(const char* name) const;
  std::string text(const char* name) const;
  void name_all(const char* attribute, const xla::Args& args, std::vector<Named>& into) const;

  const xla::CallFrame& call_;
  std::vector<Named> inputs_, outputs_;
  std::vector<int64_t> mapped_;
  int64_t items_ = 1;
};

}  // namespace sieve
