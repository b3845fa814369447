"""From files and PACS to tensors on the training device."""
