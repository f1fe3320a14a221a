// What the vocabulary ops share: the type of their logits.
#pragma once

namespace specvlm {

enum class LogitsType { kBFloat16, kFloat16, kFloat32 };

}  // namespace specvlm
