// Checks of steps on pages.
#pragma once

namespace selfattn::native {

void check_pages();  // that the caller manages
void check_pool();

}  // namespace selfattn::native
