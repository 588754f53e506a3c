"""Pictures of who talks to whom, as SVG text: `docs/` is drawn with them.

    from moecomm import Nodes, draw

    Path("two_hops.svg").write_text(draw.two_hops_svg(Nodes.of_size(4, 16)))

The same arguments give the same bytes, on every machine.
"""

from moecomm.draw.hops import lanes_svg, two_hops_svg
from moecomm.draw.layouts import layouts_svg
from moecomm.draw.topology import topology_svg
from moecomm.draw.traffic import traffic_svg

__all__ = ["lanes_svg", "layouts_svg", "topology_svg", "traffic_svg", "two_hops_svg"]
