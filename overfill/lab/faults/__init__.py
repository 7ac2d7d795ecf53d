"""Tools that inject faults into services and into the connections between them."""
