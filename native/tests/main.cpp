// Runs every test, or those whose names contain the first argument.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "test.h"

static std::string noted;

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

void note(const std::string& text) { noted = text; }

void fail(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n  in %s\n", file, line, what.c_str(), noted.c_str());
  std::abort();
}

int main(int count, char** words) {
  int done = 0;
  for (const Test& t : tests()) {
    if (count > 1 && !std::strstr(t.name, words[1])) continue;
    noted = t.name;
    t.run();
    std::printf("%s\n", t.name);
    std::fflush(stdout);
    ++done;
  }
  std::printf("%d tests passed\n", done);
  return done ? 0 : 1;
}
