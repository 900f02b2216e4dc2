// What metadata.json at the end of a .tflite file says.
#pragma once
#include <cctype>
#include <charconv>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using Error = std::runtime_error;

// Of `raw` in metadata.json; levels are of stride 2^level, units in pixels of the network's input.
struct Raw {
  std::vector<std::pair<int, float>> ray_units;
  float ray_limit, score_threshold, nms_iou, voting_iou, temperature, score_bias;
  int candidates, max_detections;
  bool multi_label;
};

struct Metadata {
  std::vector<std::string> labels;
  std::vector<float> shown_scores;  // least score of what is worth showing, of each class: of best F1, else 0.3
  bool stretch = false, is_raw = false, cpu_only = false;  // cpu_only: LiteRT's GPU would give other polygons
  Raw raw;
};

// metadata.json, which export put behind the model as the one member of a zip archive, not compressed.
inline std::string metadata_text(const std::string& file) {
  const auto number = [&](size_t at, int bytes) {
    size_t value = 0;
    while (bytes--) value = value << 8 | static_cast<unsigned char>(file.at(at + bytes));
    return value;
  };
  try {
    const size_t tail = file.size() - 22, entry = number(tail + 16, 4), local = number(entry + 42, 4);
    const size_t begin = local + 30 + number(local + 26, 2) + number(local + 28, 2), size = number(entry + 24, 4);
    const bool stored = !file.compare(tail, 4, "PK\5\6") && number(entry + 10, 2) == 0 && begin + size <= entry;
    if (stored && !file.compare(entry + 46, 13, "metadata.json")) return file.substr(begin, size);
  } catch (const std::out_of_range&) {
  }
  throw Error("no metadata.json at its end: cut off, or not made by polarmask export");
}

// Numbers are looked up by their keys as json.dumps writes them, `"key": `, which in a class's name would have backslashes.
inline Metadata read_metadata(const std::string& file) {
  const std::string text = metadata_text(file);
  const auto wrong = [](const std::string& what) { return Error("metadata.json is not as export writes it: " + what); };
  const auto find = [&](const std::string& key, size_t from) {  // what follows `"key": `, or npos
    const size_t at = text.find('"' + key + "\": ", from);
    return at == std::string::npos ? at : at + key.size() + 4;
  };
  const auto parse = [&](size_t& at, const std::string& key, double least, double most) {  // a number, and `at` behind it
    double value = -1;
    if (at > text.size()) throw wrong(key + " is missing");
    while (at < text.size() && (std::isspace(static_cast<unsigned char>(text[at])) || text[at] == ',')) ++at;
    const auto [rest, problem] = std::from_chars(text.data() + at, text.data() + text.size(), value);
    if (problem != std::errc() || !(value >= least && value <= most)) throw wrong(key);
    at = rest - text.data();
    return value;
  };
  const auto next = [&](size_t at) { return text.find_first_not_of(" \n\r\t,", at); };

  Metadata found;
  found.stretch = text.find("\"resize\": \"stretch\"") != std::string::npos;
  for (size_t at = 0, end; (at = text.find("\"name\": \"", at)) != std::string::npos; at = end) {
    for (end = at += 9; end < text.size() && text[end] != '"';) end += text[end] == '\\' ? 2 : 1;
    found.labels.push_back(text.substr(at, end - at));
  }
  found.shown_scores.assign(found.labels.size(), 0.3f);
  if (size_t at = find("thresholds", 0); at != std::string::npos) {
    if ((at = find("classes", at)) == std::string::npos || text[at++] != '[') throw wrong("thresholds");
    for (float& score : found.shown_scores) score = float(parse(at, "thresholds", 0, 1.5));
    if ((at = next(at)) == std::string::npos || text[at] != ']') throw wrong("thresholds has not one for each class");
  }
  const size_t only = find("cpu_only", 0);
  found.cpu_only = only != std::string::npos && !text.compare(only, 4, "true");
  const size_t raw = find("raw", 0);
  if (raw == std::string::npos || text[raw] != '{') return found;
  found.is_raw = true;
  const auto value = [&](const std::string& key, double least, double most) {
    size_t at = find(key, raw);
    return parse(at, key, least, most);
  };
  size_t at = find("ray_units", raw);
  if (at == std::string::npos || text[at] != '{') throw wrong("ray_units");
  while ((at = next(at + 1)) != std::string::npos && text[at] == '"') {
    const int level = int(parse(++at, "ray_units", 1, 10));
    if (text.compare(at, 3, "\": ")) throw wrong("ray_units");
    const float unit = float(parse(at += 3, "ray_units", 0, 1 << 15));
    found.raw.ray_units.emplace_back(level, unit);
    at = next(at) - 1;
  }
  if (found.raw.ray_units.empty()) throw wrong("ray_units");
  const auto optional = [&](const std::string& key, double least, double most, double otherwise) {
    return find(key, raw) == std::string::npos ? otherwise : value(key, least, most);
  };
  found.raw.ray_limit = float(value("ray_limit", 0, 50));
  found.raw.score_threshold = float(value("score_threshold", 0, 10));
  found.raw.nms_iou = float(value("nms_iou", 0, 1));
  found.raw.candidates = int(value("candidates", 1, 1e9));
  found.raw.max_detections = int(value("max_detections", 1, 100000));
  found.raw.temperature = float(optional("temperature", 0.01, 100, 1));
  found.raw.score_bias = float(optional("score_bias", -50, 50, 0));
  found.raw.voting_iou = float(optional("voting_iou", 0, 1, 0));
  const size_t pairs = find("multi_label", raw);
  found.raw.multi_label = pairs != std::string::npos && !text.compare(pairs, 4, "true");
  return found;
}
