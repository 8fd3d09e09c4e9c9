// Takes the place of Torch's header of this name: nothing is registered where there is no Torch.
#pragma once
