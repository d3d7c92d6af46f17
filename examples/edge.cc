// Samples -> tokens with an edge bundle and LiteRT's C interface, as an application would.
//
//   ffmpeg -v error -i song.mp3 -ac 1 -ar 16000 -f f32le song.f32
//   edge edge/model.tflite song.f32 [MAX_TOKENS]
//
// prints the token ids of each segment, a line each: those of
// `python -m mt3_keras transcribe --model edge --nostop_runaways`. The bundle is that of a network
// with tokens, such as mt3; a detector's, such as small's, has one signature, `detect`, and no
// search. MAX_TOKENS, 512 unless given, is the length of the cache. A step's time grows with it:
// mt3_keras/engines/litert.py lets it grow as needed.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "litert/c/litert_common.h"
#include "litert/c/litert_compiled_model.h"
#include "litert/c/litert_environment.h"
#include "litert/c/litert_model.h"
#include "litert/c/litert_options.h"
#include "litert/c/litert_tensor_buffer.h"

namespace {

// As in config.json.
constexpr size_t kHopSamples = 128, kSegmentFrames = 256;
constexpr int kEos = 1;
constexpr float kHidden = -1e9f;  // bias of a position that holds nothing yet

void Check(LiteRtStatus status, const std::string& what) {
  if (status == kLiteRtStatusOk) return;
  std::fprintf(stderr, "edge: %s: LiteRT status %d\n", what.c_str(), static_cast<int>(status));
  std::exit(1);
}

struct Tensor {
  LiteRtTensorBuffer buffer = nullptr;
  std::vector<int> shape;

  size_t size() const {
    size_t product = 1;
    for (int n : shape) product *= n;
    return product;
  }
};

// Its elements as long as it lives; LiteRT must not run meanwhile.
template <typename T>
class Elements {
 public:
  explicit Elements(const Tensor& tensor) : tensor_(tensor) {
    void* address;
    Check(LiteRtLockTensorBuffer(tensor.buffer, &address, kLiteRtTensorBufferLockModeReadWrite),
          "lock");
    data_ = static_cast<T*>(address);
  }
  ~Elements() { LiteRtUnlockTensorBuffer(tensor_.buffer); }
  T& operator[](size_t i) { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + tensor_.size(); }

 private:
  const Tensor& tensor_;
  T* data_;
};

// A signature of the model. A tensor that `shared` has by name is used, not made.
struct Signature {
  LiteRtCompiledModel compiled;
  LiteRtParamIndex index = 0;
  std::vector<std::string> input_names, output_names;
  std::map<std::string, Tensor> tensors;

  Signature(LiteRtEnvironment environment, LiteRtModel model, LiteRtCompiledModel compiled,
            const std::string& key, const std::map<std::string, Tensor>& shared, int max_tokens)
      : compiled(compiled), tensors(shared) {
    LiteRtSignature signature;
    const char* name = "";
    for (;; ++index) {
      Check(LiteRtGetModelSignature(model, index, &signature), "no signature " + key);
      Check(LiteRtGetSignatureKey(signature, &name), key);
      if (name == key) break;
    }
    LiteRtParamIndex num_inputs, num_outputs;
    Check(LiteRtGetNumSignatureInputs(signature, &num_inputs), key);
    Check(LiteRtGetNumSignatureOutputs(signature, &num_outputs), key);
    LiteRtTensor tensor;
    for (LiteRtParamIndex i = 0; i < num_inputs; ++i) {
      Check(LiteRtGetSignatureInputName(signature, i, &name), key);
      Check(LiteRtGetSignatureInputTensorByIndex(signature, i, &tensor), name);
      input_names.push_back(name);
      if (Make(environment, tensor, name, max_tokens)) {
        const std::vector<int>& shape = tensors[name].shape;
        Check(LiteRtCompiledModelResizeInputTensor(compiled, index, i, shape.data(), shape.size()),
              name);
      }
    }
    for (LiteRtParamIndex i = 0; i < num_outputs; ++i) {
      Check(LiteRtGetSignatureOutputName(signature, i, &name), key);
      Check(LiteRtGetSignatureOutputTensorByIndex(signature, i, &tensor), name);
      output_names.push_back(name);
      Make(environment, tensor, name, max_tokens);
    }
  }

  // Makes a tensor of one sequence, another open dimension max_tokens; returns whether any is open.
  bool Make(LiteRtEnvironment environment, LiteRtTensor tensor, const std::string& name,
            int max_tokens) {
    if (tensors.count(name)) return false;
    LiteRtRankedTensorType type;
    Check(LiteRtGetRankedTensorType(tensor, &type), name);
    Tensor made;
    bool is_open = false;
    for (unsigned i = 0; i < type.layout.rank; ++i) {
      int& n = type.layout.dimensions[i];
      is_open = is_open || n < 0;
      if (n < 0) n = i == 0 ? 1 : max_tokens;
      made.shape.push_back(n);
    }
    // All are float32 or int32.
    Check(LiteRtCreateManagedTensorBuffer(environment, kLiteRtTensorBufferTypeHostMemory, &type,
                                          4 * made.size(), &made.buffer),
          name);
    tensors[name] = made;
    return is_open;
  }

  template <typename T>
  Elements<T> of(const std::string& name) {
    return Elements<T>(tensors.at(name));
  }

  void Run() {
    std::vector<LiteRtTensorBuffer> inputs, outputs;
    for (const std::string& name : input_names) inputs.push_back(tensors.at(name).buffer);
    for (const std::string& name : output_names) outputs.push_back(tensors.at(name).buffer);
    Check(LiteRtRunCompiledModel(compiled, index, inputs.size(), inputs.data(), outputs.size(),
                                 outputs.data()),
          "run");
  }
};

// Clears the cache: no position is seen.
void Forget(Signature& step) {
  for (auto& [name, tensor] : step.tensors) {
    const bool is_cache = name.rfind("keys_", 0) == 0 || name.rfind("values_", 0) == 0;
    Elements<float> elements(tensor);
    if (is_cache) std::fill(elements.begin(), elements.end(), 0.0f);
    if (name == "bias") std::fill(elements.begin(), elements.end(), kHidden);
  }
}

// Writes the keys and values of a position into the cache, and shows it to the next steps.
void Remember(Signature& step, int position) {
  const std::vector<int>& shape = step.tensors.at("columns").shape;  // 1, 2 * layers, heads, width
  const size_t num_values = static_cast<size_t>(shape[2]) * shape[3];
  const size_t max_tokens = step.tensors.at("bias").size();
  auto columns = step.of<float>("columns");
  for (int i = 0; i < shape[1]; ++i) {
    auto cache = step.of<float>((i % 2 ? "values_" : "keys_") + std::to_string(i / 2));
    for (size_t j = 0; j < num_values; ++j) {
      cache[j * max_tokens + position] = columns[i * num_values + j];
    }
  }
  step.of<float>("bias")[position] = 0.0f;
}

std::vector<int> WriteTokens(Signature& step) {
  Forget(step);
  std::vector<int> tokens;
  const int max_tokens = static_cast<int>(step.tensors.at("bias").size());
  int token = 0;
  for (int position = 0; token != kEos && position < max_tokens; ++position) {
    step.of<int>("tokens")[0] = token;
    step.of<int>("positions")[0] = position;
    step.Run();
    Remember(step, position);
    auto logits = step.of<float>("logits");
    token = static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    tokens.push_back(token);
  }
  return tokens;
}

std::vector<float> ReadSamples(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "edge: %s: cannot be read\n", path);
    std::exit(1);
  }
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  std::vector<float> samples(bytes.size() / sizeof(float));
  if (!samples.empty()) std::memcpy(samples.data(), bytes.data(), samples.size() * sizeof(float));
  return samples;
}

}  // namespace

int main(int argc, char** argv) {
  const int max_tokens = argc > 3 ? std::atoi(argv[3]) : 512;
  if (argc < 3 || argc > 4 || max_tokens < 1) {
    std::fprintf(stderr, "usage: edge model.tflite samples.f32 [MAX_TOKENS]\n");
    return 2;
  }
  const std::vector<float> samples = ReadSamples(argv[2]);
  LiteRtEnvironment environment;
  LiteRtModel model;
  LiteRtOptions options;
  LiteRtCompiledModel compiled;
  Check(LiteRtCreateEnvironment(0, nullptr, &environment), "environment");
  Check(LiteRtCreateModelFromFile(environment, argv[1], &model), argv[1]);
  Check(LiteRtCreateOptions(&options), "options");
  Check(LiteRtSetOptionsHardwareAccelerators(options, kLiteRtHwAcceleratorCpu), "options");
  Check(LiteRtCreateCompiledModel(environment, model, options, &compiled), argv[1]);
  Signature encode(environment, model, compiled, "encode", {}, max_tokens);
  // What it writes decode_step reads in place: the memory has the same names there.
  std::map<std::string, Tensor> memory;
  for (const std::string& name : encode.output_names) memory[name] = encode.tensors.at(name);
  Signature step(environment, model, compiled, "decode_step", memory, max_tokens);

  const size_t segment_samples = kHopSamples * kSegmentFrames;
  for (size_t start = 0; start <= samples.size(); start += segment_samples) {
    const size_t left = samples.size() - start;
    {
      auto window = encode.of<float>("samples");  // longer than a segment: what follows it too
      const size_t room = window.end() - window.begin();
      float* rest = std::copy_n(samples.begin() + start, std::min(left, room), window.begin());
      std::fill(rest, window.end(), 0.0f);
      encode.of<int>("num_frames")[0] =
          static_cast<int>(std::min(kSegmentFrames, left / kHopSamples + 1));
    }
    encode.Run();
    for (int token : WriteTokens(step)) std::printf("%d ", token);
    std::printf("\n");
  }
}
