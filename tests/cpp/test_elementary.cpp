// The elementary functions of numbers that come in, raw, by standard input; results go out by standard output. The
// first argument names the function, the second the dtype, the third what computes: scalars, or lanes of the
// instruction set that this is built for.
#include <cstdio>
#include <string>
#include <vector>

#include "cpu/vec.h"

using namespace fastpool;

namespace {

template <class V>
V evaluate(const std::string& function, V x) {
  if (function == "exp") return fastpool::exp(x);
  if (function == "log1p") return fastpool::log1p(x);
  if (function == "tanh") return fastpool::tanh(x);
  const Exponential<V> e = exponential(x);
  return function == "factor" ? e.p : e.n;
}

template <class A>
void answer(const std::string& function, bool lanes) {
  std::vector<A> x;
  for (A one; std::fread(&one, sizeof one, 1, stdin) == 1;) x.push_back(one);
  const int64_t count = static_cast<int64_t>(x.size());
  if (lanes) {
    FASTPOOL_ISA::over_columns<A>(0, count, [&](int64_t at, int n) {
      using V = typename FASTPOOL_ISA::Vec<A>::type;
      FASTPOOL_ISA::store_part(&x[at], evaluate(function, FASTPOOL_ISA::load_part<V>(&x[at], n)), n);
    });
  } else {
    for (A& one : x) one = evaluate(function, one);
  }
  std::fwrite(x.data(), sizeof(A), x.size(), stdout);
}

}  // namespace

int main(int, char** arguments) {
  const std::string function = arguments[1], dtype = arguments[2], kind = arguments[3];
  if (dtype == "float64") {
    answer<double>(function, kind == "lanes");
  } else {
    answer<float>(function, kind == "lanes");
  }
}
