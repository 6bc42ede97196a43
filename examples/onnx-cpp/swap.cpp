// One session, and adapters swapped on it from run to run, by ONNX Runtime's own adapters:
//
//   swap FOLDER TOKEN,TOKEN,... [ADAPTER.onnx_adapter ...]
//
// FOLDER is what `dora-export merge ... --to onnx-adapters` made. Prints a line for the base and for each adapter: its
// file, and the eight tokens that follow greedily.
//
//   c++ -std=c++17 -O2 -I HEADERS swap.cpp LIBRARY -Wl,-rpath,"$(dirname LIBRARY)" -o swap
//
// HEADERS: include/onnxruntime/core/session of ONNX Runtime's sources, or `include` of its release archives. LIBRARY:
// libonnxruntime.so of an archive; of Python's package, which has no headers, it is in onnxruntime/capi.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <map>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

namespace {

const Ort::MemoryInfo kMemory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);

Ort::Value int64s(std::vector<int64_t>& values) {
  const int64_t shape[] = {1, static_cast<int64_t>(values.size())};
  return Ort::Value::CreateTensor<int64_t>(kMemory, values.data(), values.size(), shape, 2);
}

bool starts_with(const std::string& text, const std::string& beginning) { return text.rfind(beginning, 0) == 0; }

/// The tokens that follow the prompt, of the base or of the adapter that `options` name.
std::vector<int64_t> generate(Ort::Session& session, const Ort::RunOptions& options, std::vector<int64_t> ids, int count) {
  const std::string kPast = "past_key_values.";
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> past_names, output_names{"logits"};
  std::map<std::string, Ort::Value> past;
  bool positioned = false;
  for (size_t place = 0; place < session.GetInputCount(); ++place) {
    const std::string name = session.GetInputNameAllocated(place, allocator).get();
    positioned = positioned || name == "position_ids";
    if (!starts_with(name, kPast)) continue;
    std::vector<int64_t> shape = session.GetInputTypeInfo(place).GetTensorTypeAndShapeInfo().GetShape();
    shape[0] = 1, shape[2] = 0;
    past.emplace(name, Ort::Value::CreateTensor<float>(allocator, shape.data(), shape.size()));
    past_names.push_back(name);
    output_names.push_back("present." + name.substr(kPast.size()));
  }
  std::vector<int64_t> made, mask, positions;
  while (static_cast<int>(made.size()) < count) {
    positions.resize(ids.size());
    std::iota(positions.begin(), positions.end(), static_cast<int64_t>(mask.size()));
    mask.insert(mask.end(), ids.size(), 1);
    std::vector<const char*> names{"input_ids", "attention_mask"}, wanted;
    std::vector<Ort::Value> values;
    values.push_back(int64s(ids));
    values.push_back(int64s(mask));
    if (positioned) {
      names.push_back("position_ids");
      values.push_back(int64s(positions));
    }
    for (const std::string& name : past_names) {
      names.push_back(name.c_str());
      values.push_back(std::move(past.at(name)));
    }
    for (const std::string& name : output_names) wanted.push_back(name.c_str());
    std::vector<Ort::Value> outputs =
        session.Run(options, names.data(), values.data(), values.size(), wanted.data(), wanted.size());
    const std::vector<int64_t> shape = outputs[0].GetTensorTypeAndShapeInfo().GetShape();
    const float* last = outputs[0].GetTensorData<float>() + (shape[1] - 1) * shape[2];
    made.push_back(std::max_element(last, last + shape[2]) - last);
    for (size_t place = 0; place < past_names.size(); ++place) {
      past.insert_or_assign(past_names[place], std::move(outputs[place + 1]));
    }
    ids = {made.back()};
  }
  return made;
}

void print(const std::string& name, const std::vector<int64_t>& tokens) {
  std::cout << name << ':';
  for (const int64_t token : tokens) std::cout << ' ' << token;
  std::cout << std::endl;
}

}  // namespace

int main(int count, char** arguments) try {
  if (count < 3) {
    std::cerr << "swap FOLDER TOKEN,TOKEN,... [ADAPTER.onnx_adapter ...]\n";
    return 2;
  }
  std::vector<int64_t> prompt;
  std::istringstream given(arguments[2]);
  for (std::string token; std::getline(given, token, ',');) prompt.push_back(std::stoll(token));

  Ort::Env env(ORT_LOGGING_LEVEL_ERROR);  // one warning for each slot otherwise
  const std::string path = std::string(arguments[1]) + "/model.onnx";
  Ort::Session session(env, path.c_str(), Ort::SessionOptions{});
  print("base", generate(session, Ort::RunOptions{}, prompt, 8));
  for (int place = 3; place < count; ++place) {
    const Ort::LoraAdapter adapter = Ort::LoraAdapter::CreateLoraAdapter(arguments[place], nullptr);
    Ort::RunOptions options;
    options.AddActiveLoraAdapter(adapter);  // which does not keep it: `adapter` has to live as long as the runs
    print(arguments[place], generate(session, options, prompt, 8));
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
