// The arithmetic for one instruction set: compiled once for each (build.py), with LEVEL as its name.
#include "forward.h"
#include "packing.h"

namespace loadstone {
namespace LEVEL {

static void forward(Engine& e, void* call, int thread) { Forward(e, *static_cast<Call*>(call), thread).run(); }

}  // namespace LEVEL

#define NAME_OF(level) #level
#define NAME(level) NAME_OF(level)
#define TABLE_OF(level) level##_level
#define TABLE(level) TABLE_OF(level)
extern const Level TABLE(LEVEL);
const Level TABLE(LEVEL) = {NAME(LEVEL), LEVEL::forward, LEVEL::pack, LEVEL::unpack};

}  // namespace loadstone
