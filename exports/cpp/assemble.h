// Polygons from the outputs of a --raw file, as lite.py assembles them.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "metadata.h"

struct Detection {
  int label;
  float score;
  std::vector<float> box, polygon;  // xmin, ymin, xmax, ymax; x, y, x, y, ...
};

// A level of the head's outputs: [height, width, classes], [height, width, 1], [height, width, rays].
struct Level {
  int height, width, classes, rays;
  const float *class_logits, *centerness_logits, *ray_logits;
};

// What may become a detection, or have a vote on one's polygon.
struct Candidate {
  Detection found;
  float center[2];
  std::vector<float> rays;     // their lengths, pixels
  std::array<float, 4> apart;  // the box, moved where no two classes overlap
};

inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

inline float area(const std::array<float, 4>& box) { return (box[2] - box[0]) * (box[3] - box[1]); }

inline float common_area(const std::array<float, 4>& a, const std::array<float, 4>& b) {
  const auto side = [&](int i) { return std::max(std::min(a[i + 2], b[i + 2]) - std::max(a[i], b[i]), 0.f); };
  return side(0) * side(1);
}

// Polygon and box of the rays, which point the `ways` x, y, x, y, ..., cut at the `limit` of the image.
inline void outline(Candidate& one, const std::vector<float>& ways, const float* limit) {
  one.found.box = {limit[0], limit[1], 0, 0};
  one.found.polygon.resize(ways.size());
  for (size_t i = 0; i < ways.size(); ++i) {
    const size_t axis = i % 2;
    const float place = std::clamp(one.center[axis] + one.rays[i / 2] * ways[i], 0.f, limit[axis]);
    one.found.polygon[i] = place;
    one.found.box[axis] = std::min(one.found.box[axis], place);
    one.found.box[axis + 2] = std::max(one.found.box[axis + 2], place);
  }
}

// How far a ray of `one` reaches in the polygon of `other`: Newton's method from the `length` in its own. Where the ray meets
// the line of that side of the other polygon which its end lies towards; where it meets none ahead, the last length stays.
inline float length_in(const Candidate& other, const Candidate& one, const float* way, float length,
                       const std::vector<float>& ways) {
  const float shift[] = {one.center[0] - other.center[0], one.center[1] - other.center[1]};
  const int n = int(other.rays.size());
  for (int step = 0; step < 2; ++step) {
    const float angle = std::atan2(shift[1] + length * way[1], shift[0] + length * way[0]);
    const int first = (int(std::floor(angle * float(n / (2 * 3.14159265358979323846)))) + n) % n, second = (first + 1) % n;
    const float r1 = other.rays[first], r2 = other.rays[second];
    const float start[] = {r1 * ways[2 * first], r1 * ways[2 * first + 1]};
    const float along[] = {r2 * ways[2 * second] - start[0], r2 * ways[2 * second + 1] - start[1]};
    const float across = way[0] * along[1] - way[1] * along[0];
    const float meets = ((start[0] - shift[0]) * along[1] - (start[1] - shift[1]) * along[0]) /
                        (std::abs(across) > 1e-6f ? across : 1e-6f);
    if (meets > length / 2 && meets < 2 * length) length = meets;
  }
  return length;
}

// Rays of `one`, averaged by score with those of the four best of all, best first, whose boxes overlap its own more than `iou`.
inline std::vector<float> vote(const Candidate& one, const std::vector<Candidate>& all, float iou,
                               const std::vector<float>& ways) {
  std::vector<const Candidate*> voters;
  float sum = 0, rest = 1;
  for (size_t i = 0; i < all.size() && voters.size() < 4; ++i) {
    if (!(common_area(one.apart, all[i].apart) > (area(all[i].apart) + area(one.apart)) * (iou / (1 + iou)))) continue;
    voters.push_back(&all[i]);
    sum += all[i].found.score;
  }
  std::vector<float> lengths(one.rays.size());
  for (const Candidate* voter : voters) {
    const float weight = voter->found.score / std::max(sum, 1e-12f);
    rest -= weight;
    for (size_t k = 0; k < lengths.size(); ++k) lengths[k] += weight * length_in(*voter, one, &ways[2 * k], one.rays[k], ways);
  }
  for (size_t k = 0; k < lengths.size(); ++k) lengths[k] += one.rays[k] * rest;
  return lengths;
}

// The best of each level, level by level, without polygons.
inline std::vector<Candidate> candidates(const std::vector<Level>& levels, const Raw& raw) {
  const auto finite = [](float x) { return std::isfinite(x) ? x : throw Error("a number that is not finite"); };
  std::vector<Candidate> all;
  for (size_t i = 0; i < levels.size(); ++i) {
    const Level& level = levels[i];
    const auto [number, unit] = raw.ray_units[i];
    struct Place { float score; int at, label; };
    std::vector<Place> best;
    for (int at = 0; at < level.height * level.width; ++at) {
      const float* logits = level.class_logits + size_t(at) * level.classes;
      const int highest = int(std::max_element(logits, logits + level.classes) - logits);
      const auto [first, last] = raw.multi_label ? std::pair(0, level.classes) : std::pair(highest, highest + 1);
      for (int label = first; label < last; ++label) {
        const float score = finite(sigmoid(logits[label]) * sigmoid(level.centerness_logits[at]));
        if (score > raw.score_threshold || raw.voting_iou > 0) best.push_back({score, at, label});  // all may vote
      }
    }
    const auto better = [](const Place& a, const Place& b) {  // of equal scores the first place
      return std::tie(b.score, a.at, a.label) < std::tie(a.score, b.at, b.label);
    };
    const size_t count = std::min(best.size(), size_t(raw.candidates));
    std::partial_sort(best.begin(), best.begin() + count, best.end(), better);
    best.resize(count);
    for (const Place& place : best) {
      const float stride = float(1 << number);
      const float x = place.at % level.width + 0.5f, y = place.at / level.width + 0.5f;
      Candidate one{{place.label, place.score, {}, {}}, {stride * x, stride * y}, {}, {}};
      for (int k = 0; k < level.rays; ++k) {
        const float logit = finite(level.ray_logits[size_t(place.at) * level.rays + k]);
        one.rays.push_back(unit * std::exp(std::clamp(logit, -raw.ray_limit, raw.ray_limit)));
      }
      all.push_back(std::move(one));
    }
  }
  return all;
}

// A --raw file's outputs, level by level as in raw.ray_units, to what the other files give: detections of descending scores,
// relative to the network's input of `height` x `width`. The best of each level, decoded, NMS within each class, votes.
inline std::vector<Detection> assemble(const std::vector<Level>& levels, const Raw& raw, int height, int width) {
  const float limit[] = {float(width), float(height)};
  std::vector<float> ways;
  for (int k = 0, rays = levels.empty() ? 0 : levels[0].rays; k < rays; ++k) {
    const double angle = 2 * 3.14159265358979323846 * k / rays;
    ways.insert(ways.end(), {float(std::cos(angle)), float(std::sin(angle))});
  }
  for (const Level& level : levels) {
    if (size_t(level.rays) * 2 != ways.size()) throw Error("levels of different rays");
  }
  std::vector<Candidate> all = candidates(levels, raw);
  const auto better = [](const Candidate& a, const Candidate& b) { return a.found.score > b.found.score; };
  std::stable_sort(all.begin(), all.end(), better);
  for (Candidate& one : all) {
    outline(one, ways, limit);
    for (int i = 0; i < 4; ++i) one.apart[i] = one.found.box[i] + one.found.label * (std::max(limit[0], limit[1]) + 1);
  }
  std::vector<Candidate*> kept;
  for (Candidate& one : all) {
    if (kept.size() == size_t(raw.max_detections) || !(one.found.score > raw.score_threshold)) break;
    const auto overlaps = [&](const Candidate* other) {
      const float common = common_area(one.apart, other->apart);
      return common > raw.nms_iou * (area(other->apart) + area(one.apart) - common);
    };
    if (std::none_of(kept.begin(), kept.end(), overlaps)) kept.push_back(&one);
  }
  std::vector<Detection> found;
  for (Candidate* one : kept) {
    if (raw.voting_iou > 0) {
      Candidate voted = *one;  // others are to see it as it was
      voted.rays = vote(*one, all, raw.voting_iou, ways);
      outline(voted, ways, limit);
      found.push_back(std::move(voted.found));
    } else {
      found.push_back(std::move(one->found));
    }
  }
  for (Detection& one : found) {
    if (raw.temperature != 1 || raw.score_bias != 0) {  // of calibrated scores
      const float score = std::clamp(one.score, 1e-6f, 1 - 1e-6f);
      one.score = sigmoid((std::log(score) - std::log(1 - score)) / raw.temperature + raw.score_bias);
    }
    for (int i = 0; i < 4; ++i) one.box[i] /= limit[i % 2];
    for (size_t i = 0; i < one.polygon.size(); ++i) one.polygon[i] /= limit[i % 2];
  }
  return found;
}
