// How Marp draws a deck: everything in one file, nothing from elsewhere.
export default {
  themeSet: ["./theme.css"],
  html: true, // pictures are elements of HTML
  options: { emoji: { shortcode: false, unicode: false } }, // else pictures from a server
};
