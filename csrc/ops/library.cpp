// The operators' schemas. Devices register their implementations in files of their own.
#include <torch/library.h>

TORCH_LIBRARY(regtopk, library) {
  library.def(
      "compress_(Tensor gradient, Tensor(a!) residual, Tensor(b!) payload, Tensor? sent, Tensor? feedback, *, "
      "int k, float mu=1.0, str distortion='previous', int step=0, int plan=0) -> ()");
  library.def(
      "aggregate_(Tensor(a!) gradient, Tensor payloads, Tensor(b!)? feedback, *, "
      "int k, int rank=0, str distortion='previous', int step=0, int plan=0) -> ()");
  library.def("put_back_(Tensor(a!) residual, Tensor payload, *, ScalarType dtype) -> ()");
  library.def("encode(Tensor indices, Tensor values, *, int numel, int step=0, int plan=0) -> Tensor");
  library.def("decode(Tensor payload, *, int numel, int k, ScalarType dtype) -> (Tensor indices, Tensor values)");
}
